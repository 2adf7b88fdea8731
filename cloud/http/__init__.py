"""HTTP: OpenAI's interface to generation, and the Open Inference Protocol."""
