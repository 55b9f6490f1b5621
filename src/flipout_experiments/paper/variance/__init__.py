"""Figure 1 and Theorem 2: the variance of a gradient against the batch size."""
