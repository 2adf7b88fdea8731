"""The language model: configuration, weights, forward, three layouts of the KV cache, tokenizer, and sampling."""
