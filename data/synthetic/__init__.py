"""Synthetic data sets: invented faces, voices, events and pictures. Nothing in them is a recording."""
