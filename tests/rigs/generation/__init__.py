"""A tiny Llama, its forward written plainly, and requests."""
