"""PURE. What a release offers to devices, and which release a device is offered."""
