"""The generation path: a small causal language model streams replies to many clients, under one scheduler."""
