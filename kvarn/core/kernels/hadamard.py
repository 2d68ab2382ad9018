"""Rotations of rows in registers: values whole, keys and queries in fours. See `core.hadamard`."""

import triton
import triton.language as tl


@triton.constexpr_function
def _stages(width):
    return width.bit_length() - 1


@triton.jit
def hadamard(x):
    """Multiply the rows of x, [R, D], by Sylvester's matrix of +1 and -1; D is a power of two."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for stage in tl.static_range(_stages(D)):
        pairs = tl.permute(tl.reshape(x, (R, D // (2 << stage), 2, 1 << stage)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (R, D))
    return x


@triton.jit
def rotated_in_fours(x0, x1, x2, x3):
    """Return the four quarters of rows rotated as keys are, given theirs, float32, in the order of `load_in_fours`."""
    both, differ = x0 + x1, x0 - x1
    y0, y1 = both + x2 + x3, differ + x2 - x3
    y2, y3 = both - x2 - x3, differ - x2 + x3
    return y0 * 0.5, y1 * 0.5, y2 * 0.5, y3 * 0.5


@triton.jit
def load_in_fours(row_ptrs, channel, mask, D: tl.constexpr):
    """Load rows rotated as keys are, float32. row_ptrs + channel: a row's channels, along either axis; mask like it.

    From the second-level cache: queries are read before the kernel waits (see `kernels.chain`).
    """
    quarter = channel // (D // 4)
    ptrs = row_ptrs + channel % (D // 4)
    y = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    for other in tl.static_range(1, 4):
        x = tl.load(ptrs + other * (D // 4), mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        common = quarter & other
        y += tl.where((common ^ (common >> 1)) & 1 == 0, x, -x)
    return y * 0.5
