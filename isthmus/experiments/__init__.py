"""The papers' experiments, each a command that writes a result file."""
