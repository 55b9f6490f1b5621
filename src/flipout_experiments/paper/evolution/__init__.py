"""Figures 2(b) to 2(d) and 5, and policies trained by evolution."""
