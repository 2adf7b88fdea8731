"""A real service on loopback, its stores and their databases, and callers that do it harm."""
