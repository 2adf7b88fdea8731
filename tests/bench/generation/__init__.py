"""Measurements of generation: decisions, steps against their floor, live against simulated, rivals."""
