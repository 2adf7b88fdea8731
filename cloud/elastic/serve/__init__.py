"""The engine in real time behind the service: open it, decode images, register tasks, answer."""
