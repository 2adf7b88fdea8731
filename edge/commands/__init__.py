"""The command line of the device: ``isthmus edge``."""
