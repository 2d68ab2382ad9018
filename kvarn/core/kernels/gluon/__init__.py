"""Kernels whose layouts are chosen by hand, in Gluon, Triton's language for that. They need a GPU."""
