"""Warm-up methods compared: the grid of models, the comparison, its claims and figures."""
