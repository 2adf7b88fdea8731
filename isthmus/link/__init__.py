"""Faults of a network on purpose: a TCP proxy over a pure model of a link, driven by a script."""
