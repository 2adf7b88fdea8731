"""Measurements of elastic serving: ``python -m tests.bench.elastic.<name>``."""
