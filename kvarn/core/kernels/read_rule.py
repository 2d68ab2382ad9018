"""The read rule, for kernels."""

import triton
import triton.language as tl


@triton.jit
def record_end(committed, position, own_start, TAIL: tl.constexpr, G: tl.constexpr):
    """Return the position up to which a query reads records."""
    return tl.maximum(tl.maximum(tl.minimum(committed, position - TAIL), 0) // G * G, own_start)
