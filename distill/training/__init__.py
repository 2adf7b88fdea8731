"""The one training loop and what it works on: losses, checkpoints, data sets, cached teacher outputs, progress."""
