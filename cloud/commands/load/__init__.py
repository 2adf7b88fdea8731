"""The command line of the load generator: ``isthmus cloud load``."""
