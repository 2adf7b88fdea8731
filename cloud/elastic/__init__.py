"""Elastic ViT serving: the load and the utilities of its queries decide how many tokens each batch gets."""
