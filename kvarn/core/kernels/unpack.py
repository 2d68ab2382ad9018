"""Take bit planes of packed words straight to fp16 MMA operands, and say how lanes map to codes.

A masked field lands in the mantissa of fp16 1024, so an element reads ``1024 + code * 2**position``. The reader
divides ``2**position`` out of the other operand and subtracts ``1024 * sum(other operand)`` once a tile: no
arithmetic is left per element. The MMA truncates its sums, so the constant 1024 must not dwarf the codes: fields that
stand low in a word are shifted up in the mantissa, fields above it are shifted down.

A *lane* is one element of the operand's wide side, plane by plane: lane ``plane * lane_words + word``. Where a field's
words are no power of two (head_dim 96), they are padded, and lanes of padding carry no code.
"""

import triton
import triton.language as tl

BIAS = tl.constexpr(1024.0)
_BIAS_BITS = tl.constexpr(0x6400)
_WORD_BITS = 16
_MANTISSA_BITS = 10
# From this mantissa position on a field is taken in place: 1024 is at most 64 code steps away.
_LOWEST_POSITION = 4


@triton.constexpr_function
def padded_words(words):
    """Return the words of a row, padding included: a power of two."""
    return 1 << (words - 1).bit_length()


@triton.constexpr_function
def planes(bits):
    """Return the bit planes of a field."""
    return _WORD_BITS // bits


@triton.constexpr_function
def lanes(bits, words):
    """Return the lanes of a row, padding included."""
    return planes(bits) * padded_words(words)


@triton.constexpr_function
def _top(bits):
    """Return the highest mantissa position of a field."""
    return _MANTISSA_BITS - bits


@triton.constexpr_function
def _lowest(bits):
    """Return the lowest mantissa position that is taken in place."""
    return min(_LOWEST_POSITION, _top(bits))


@triton.constexpr_function
def _up(bits):
    """Return by how much the planes below the lowest position are shifted up: the last of them lands at the top."""
    return _top(bits) - (_lowest(bits) - 1) // bits * bits


@triton.constexpr_function
def _down(bits):
    """Return by how much the planes above the top are shifted down together: the last of them lands at the top."""
    return _WORD_BITS - bits - _top(bits)


@triton.constexpr_function
def _shift_up(bits, low):
    """Return by how much a field that starts at bit `low` of a word is shifted up (down if negative).

    Planes share a shift where they can, so that it is made once for all of them.
    """
    if low < _lowest(bits):
        return _up(bits)
    if low <= _top(bits):
        return 0
    return -_down(bits) if low - _down(bits) >= _lowest(bits) else _top(bits) - low


@triton.constexpr_function
def _plane_mask(bits, low):
    return ((1 << bits) - 1) << (low + _shift_up(bits, low))


@triton.constexpr_function
def plane_asm(bits, low):
    """Return the PTX that turns two packed words into two elements of the plane whose fields start at bit `low`."""
    up = _shift_up(bits, low)
    mask = _plane_mask(bits, low)
    pair = f"0x{mask << 16 | mask:08X}"
    if up == 0:
        return f"lop3.b32 $0, $1, {pair}, 0x64006400, 0xEA;"
    shift = f"shl.b32 t, $1, {up}" if up > 0 else f"shr.b32 t, $1, {-up}"
    return f"{{.reg .b32 t; {shift}; lop3.b32 $0, t, {pair}, 0x64006400, 0xEA;}}"


@triton.jit
def lane_codes(BITS: tl.constexpr, WORDS: tl.constexpr):
    """Return the index of every lane's code in its row, [lanes], and whether it carries one."""
    lane = tl.arange(0, lanes(BITS, WORDS))
    word = lane % padded_words(WORDS)
    return (lane // padded_words(WORDS)) * WORDS + word, word < WORDS


@triton.jit
def lane_weights(BITS: tl.constexpr, LOW_BIT: tl.constexpr, WORDS: tl.constexpr):
    """Return the factor that makes ``code * 2**position`` count as the lane's part of the code, [lanes], float32."""
    return weight_of((tl.arange(0, lanes(BITS, WORDS)) // padded_words(WORDS)) * BITS, BITS, LOW_BIT)


@triton.jit
def weight_of(low, BITS: tl.constexpr, LOW_BIT: tl.constexpr):
    """Return that factor for planes whose fields start at bits `low` of a word, float32."""
    shifted = low - _down(BITS)
    above = tl.where(shifted >= _lowest(BITS), shifted, _top(BITS))
    position = tl.where(low < _lowest(BITS), low + _up(BITS), tl.where(low <= _top(BITS), low, above))
    return tl.exp2((LOW_BIT - position).to(tl.float32))


@triton.jit
def _plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    if USE_ASM:
        out = tl.inline_asm_elementwise(
            plane_asm(BITS, PLANE * BITS), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        up: tl.constexpr = _shift_up(BITS, PLANE * BITS)
        code = words.to(tl.int32) << up if up >= 0 else words.to(tl.int32) >> -up
        out = (code & _plane_mask(BITS, PLANE * BITS) | _BIAS_BITS).to(tl.int16).to(tl.float16, bitcast=True)
    return out


@triton.jit
def side_by_side(a, b):
    """Concatenate two [R, N] along their second axis. Registers are renamed, not moved."""
    R: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (R, 2 * N))


@triton.jit
def one_below_other(a, b):
    """Concatenate two [R, N] along their first axis."""
    R: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * R, N))


@triton.jit
def one_behind_other(a, b, AXIS: tl.constexpr):
    """Concatenate two tensors of rank 3 along axis 1 or 2."""
    A: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    C: tl.constexpr = a.shape[2]
    joined = tl.join(a, b)
    if AXIS == 1:
        out = tl.reshape(tl.permute(joined, (0, 3, 1, 2)), (A, 2 * B, C))
    else:
        out = tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (A, B, 2 * C))
    return out


@triton.jit
def unpack(words, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """Return ``1024 + code * 2**position`` of every lane.

    Args:
        words: [rows, padded words], int16.
        BITS: of the field.
        USE_ASM: two words a register through one LOP3 (NVIDIA); otherwise plain integer arithmetic, same values.

    Returns:
        [rows, lanes], float16.
    """
    parts = ()
    for plane in tl.static_range(planes(BITS)):
        parts = parts + (_plane(words, plane, BITS, USE_ASM),)
    for _ in tl.static_range(planes(BITS).bit_length() - 1):
        pairs = ()
        for i in tl.static_range(0, len(parts), 2):
            pairs = pairs + (side_by_side(parts[i], parts[i + 1]),)
        parts = pairs
    return parts[0]
