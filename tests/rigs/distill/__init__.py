"""Tiny releases, trunks, cells of studies, and models of invented people."""
