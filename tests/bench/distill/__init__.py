"""Measurements of training: ``python -m tests.bench.distill.<name>``."""
