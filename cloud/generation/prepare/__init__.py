"""Work before serving: convert a GGUF file to a model directory, and measure a machine's profile."""
