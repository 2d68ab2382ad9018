"""Benchmarks of single operations on one GPU: `python -m benchmarks.kernels decode`."""
