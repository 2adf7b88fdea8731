"""HTTP: the OpenAI-compatible front of generation. Only this folder imports an HTTP server."""
