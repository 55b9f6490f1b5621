"""Run folders, checkpoints, metrics, locks, claims: what every experiment needs and none has of its own."""
