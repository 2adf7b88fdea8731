"""What Prometheus reads: calls, images, replies and personalisations. Times are histograms, in seconds."""
