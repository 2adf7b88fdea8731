"""Serve warmed models: store them, keep some of them in memory, and decide which of them serves which gamma."""
