"""The command line of tenants: ``isthmus cloud tenants``."""
