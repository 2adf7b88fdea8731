"""HTTP: OpenAI's interface to generation, and the Open Inference Protocol. Only this folder imports an HTTP server."""
