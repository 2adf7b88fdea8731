"""Run the engine in real time for the service: open it, decode images, register tasks, answer queries."""
