"""Measurements of the cloud: ``python -m tests.bench.cloud.<name>``."""
