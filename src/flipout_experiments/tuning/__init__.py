"""Language models towards a reward: ``flipout tune``."""
