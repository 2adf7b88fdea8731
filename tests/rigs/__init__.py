"""Builders that several tests share: a device, a server, tiny models and data. Each file has one subject."""
