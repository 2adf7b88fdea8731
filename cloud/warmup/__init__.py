"""Warm-up: tune a few models with fewer tokens, so that serving can remove tokens with little loss of accuracy."""
