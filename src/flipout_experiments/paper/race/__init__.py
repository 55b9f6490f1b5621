"""Figures 2a, 4 and 7: large batches under each estimator."""
