"""A Ray cluster: the connection to it, and what all that runs on one needs."""
