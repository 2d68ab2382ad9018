"""Kernels, layout and reference of the tile cache. Imports no engine."""
