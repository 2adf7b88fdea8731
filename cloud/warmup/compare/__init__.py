"""Compare warm-up methods: measure a grid of models, compare the methods on it, and draw figures."""
