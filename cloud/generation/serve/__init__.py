"""Run the engine in real time for the service: open a model, stream tokens as text, check what clients ask for."""
