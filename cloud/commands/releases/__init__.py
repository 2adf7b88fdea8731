"""The command line of releases: ``isthmus cloud release``."""
