"""What several tests need: a device, a server, tiny models and data. Each file is one subject."""
