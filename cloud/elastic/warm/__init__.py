"""Warmed models in serving: their store, which of them are in memory, and which serves which gamma."""
