"""PURE. Decide which queries run next as one batch, and how many tokens the batch gets (its gamma)."""
