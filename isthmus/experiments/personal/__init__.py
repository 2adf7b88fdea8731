"""Experiments on personalisation: the paper's tables, leaving people out, cost."""
