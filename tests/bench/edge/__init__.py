"""Measurements of the device: a day in its life, and an hour of real processes."""
