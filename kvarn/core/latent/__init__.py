"""MLA: caches of latents, which are keys and values at once."""
