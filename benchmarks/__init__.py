"""What random weights cost: one file per question, each run side by side with the plain layer in one process."""
