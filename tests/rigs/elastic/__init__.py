"""Tiny ViTs, tasks for them, and a real server that serves them within seconds."""
