"""The command line of generation: ``isthmus generate``."""
