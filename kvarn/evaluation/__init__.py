"""How good a KV cache is: what a model predicts with it, compared with what it predicts from exact keys and values."""
