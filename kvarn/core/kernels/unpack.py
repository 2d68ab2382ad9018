"""Take bit planes of packed words straight to fp16 MMA operands, and say how planes map to dot steps.

A masked field lands in the mantissa of fp16 1024, so an element reads ``1024 + code * 2**position``. The reader
divides ``2**position`` out of the other operand and subtracts ``1024 * sum(other operand)`` once a tile: no
arithmetic is left per element. The MMA truncates its sums, so the constant 1024 must not dwarf the codes: fields that
stand low in a word are shifted up in the mantissa, fields above it are shifted down.

Planes narrower than a dot accepts (16 lanes) are taken several a step, each lane with a shift of its own.
"""

import triton
import triton.language as tl

BIAS = tl.constexpr(1024.0)
_BIAS_BITS = tl.constexpr(0x6400)
_WORD_BITS = 16
_MANTISSA_BITS = 10
# From this mantissa position on a field is taken in place: 1024 is at most 64 code steps away.
_LOWEST_POSITION = 4
_MIN_DOT_LANES = 16


@triton.constexpr_function
def planes_per_step(words):
    """Return the bit planes that share one dot step."""
    narrow = words < _MIN_DOT_LANES and words & (words - 1) == 0
    return _MIN_DOT_LANES // words if narrow else 1


@triton.constexpr_function
def lane_width(words):
    """Return the lanes of one dot step, padding included: a power of two that a dot accepts."""
    return max(_MIN_DOT_LANES, 1 << (words - 1).bit_length())


@triton.constexpr_function
def used_lanes(words):
    """Return the lanes of one dot step that carry codes."""
    return words * planes_per_step(words)


@triton.constexpr_function
def dot_steps(bits, words):
    """Return the dot steps that cover all lanes of a field."""
    return _WORD_BITS // bits // planes_per_step(words)


@triton.constexpr_function
def _top(bits):
    """Return the highest mantissa position of a field."""
    return _MANTISSA_BITS - bits


@triton.constexpr_function
def _lowest(bits):
    """Return the lowest mantissa position that is taken in place."""
    return min(_LOWEST_POSITION, _top(bits))


@triton.constexpr_function
def _shift_up(bits, low):
    """Return by how much a field that starts at bit `low` of a word is shifted up (down if negative)."""
    top = _top(bits)
    return 0 if _lowest(bits) <= low <= top else top - low


@triton.constexpr_function
def step_weight(bits, low_bit, words, step):
    """Return the factor that makes ``code * 2**position`` of a step count as its part of the code."""
    if planes_per_step(words) > 1:
        return 2.0 ** (low_bit - _top(bits))
    low = step * bits
    return 2.0 ** (low_bit - low - _shift_up(bits, low))


@triton.constexpr_function
def _plane_mask(bits, low):
    return ((1 << bits) - 1) << (low + _shift_up(bits, low))


@triton.constexpr_function
def _plane_asm(bits, low):
    up = _shift_up(bits, low)
    mask = _plane_mask(bits, low)
    pair = f"0x{mask << 16 | mask:08X}"
    if up == 0:
        return f"lop3.b32 $0, $1, {pair}, 0x64006400, 0xEA;"
    shift = f"shl.b32 t, $1, {up}" if up > 0 else f"shr.b32 t, $1, {-up}"
    return f"{{.reg .b32 t; {shift}; lop3.b32 $0, t, {pair}, 0x64006400, 0xEA;}}"


@triton.jit
def lane_words(WORDS: tl.constexpr):
    """Return the word index of every lane of a dot step, [lane_width]."""
    lanes = tl.arange(0, lane_width(WORDS))
    if planes_per_step(WORDS) > 1:
        lanes = lanes % WORDS
    return lanes


@triton.jit
def unpack_step(words, STEP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, USE_ASM: tl.constexpr):
    """Return ``1024 + code * 2**position`` of one dot step.

    Args:
        words: [rows, lane_width], int16, loaded with `lane_words`.
        STEP: which of the `dot_steps`.
        USE_ASM: two words a register through one LOP3 (NVIDIA); otherwise plain integer arithmetic, same values.
    """
    if planes_per_step(WORDS) > 1:
        plane = STEP * planes_per_step(WORDS) + tl.arange(0, lane_width(WORDS)) // WORDS
        code = (words.to(tl.int32) >> (plane * BITS)[None, :]) & ((1 << BITS) - 1)
        out = ((code << _top(BITS)) | _BIAS_BITS).to(tl.int16).to(tl.float16, bitcast=True)
    elif USE_ASM:
        out = tl.inline_asm_elementwise(
            _plane_asm(BITS, STEP * BITS), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        up: tl.constexpr = _shift_up(BITS, STEP * BITS)
        code = words.to(tl.int32) << up if up >= 0 else words.to(tl.int32) >> -up
        out = (code & _plane_mask(BITS, STEP * BITS) | _BIAS_BITS).to(tl.int16).to(tl.float16, bitcast=True)
    return out


@triton.jit
def lane_weights(N: tl.constexpr, BITS: tl.constexpr, LOW_BIT: tl.constexpr, WORDS: tl.constexpr):
    """Return `step_weight` of every lane of a field, [N], float32, computed from the lane's plane."""
    if planes_per_step(WORDS) > 1:
        return tl.full((N,), 1.0, tl.float32) * step_weight(BITS, LOW_BIT, WORDS, 0)
    low = (tl.arange(0, N) // WORDS) * BITS
    top: tl.constexpr = _top(BITS)
    lowest: tl.constexpr = _lowest(BITS)
    position = tl.where((low >= lowest) & (low <= top), low, top)
    return tl.exp2((LOW_BIT - position).to(tl.float32))


@triton.jit
def halves(x):
    """Split [R, N] into its first and second R / 2 rows."""
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (2, R // 2, N)), (1, 2, 0)))


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def row_slices(x, COUNT: tl.constexpr):
    """Split [R, N] into COUNT consecutive slices of R / COUNT rows, as a tuple. COUNT is a power of two."""
    parts = (x,)
    for _ in tl.static_range(_log2(COUNT)):
        finer = ()
        for i in tl.static_range(len(parts)):
            first, second = halves(parts[i])
            finer = finer + (first, second)
        parts = finer
    return parts
