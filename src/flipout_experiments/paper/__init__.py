"""The figures and tables of the paper, one module or package each."""
