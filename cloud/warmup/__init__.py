"""Warm-up: a few models tuned with fewer tokens, so that serving may take tokens away without losing answers."""
