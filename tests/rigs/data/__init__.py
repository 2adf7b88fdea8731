"""Clips and media files for tests."""
