"""The command lines of the cloud: ``isthmus cloud`` and ``isthmus elastic``."""
