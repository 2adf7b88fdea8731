"""Measurements of the device: ``python -m tests.bench.edge.<name>``."""
