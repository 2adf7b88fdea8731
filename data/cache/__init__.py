"""Decoded clips as memory-mapped arrays, keyed by content: build it, read it, and how its keys are made."""
