"""Measurements of generation: ``python -m tests.bench.generation.<name>``."""
