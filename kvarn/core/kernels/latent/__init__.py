"""Kernels over latents (MLA)."""
