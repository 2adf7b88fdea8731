"""Experts: MLPs of which each task uses a few. Routing, the layer that runs them, their files and their memory."""
