"""Elastic ViT serving: each batch runs with as many tokens as the load and its queries' utilities bear."""
