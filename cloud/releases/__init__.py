"""Releases: which one a device is offered, what is published of them, and the copies that workers make."""
