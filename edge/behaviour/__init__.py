"""PURE. What a device does next: its state, what happens to it, and the actions that it asks for."""
