"""The vision transformer whose number of tokens changes per batch, and everything that makes it fast."""
