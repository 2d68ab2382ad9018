"""Codes of packed words as MMA operands: subnormal numbers of fp16.

A code that stands alone in the mantissa, with an exponent of zero, reads ``code * 2**(position - 24)``: one AND takes
two of them out of a register, and NVIDIA's MMAs multiply subnormal numbers as exactly as others. ``2**position`` is
divided out of the other operand, and sums are multiplied by CODE_UNIT. No bias has to be subtracted, as with
`kernels.unpack`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvarn.core.kernels.unpack import one_behind_other, planes, side_by_side

# Positions of the mantissa where fields begin: those of the word's upper byte are shifted down by a byte.
_POSITIONS = 8
# Products are smaller by 2**-4, so that a scale times a query or a weight stays inside fp16.
_HEADROOM = 4
# What sums of products with codes are multiplied by.
CODE_UNIT = gl.constexpr(2.0**28)


@gluon.constexpr_function
def _positions():
    return _POSITIONS


@gluon.constexpr_function
def _exponent(low_bit):
    """Return the exponent of the factor for a code's part that begins at its bit `low_bit` and at position 0."""
    return low_bit - _HEADROOM


@gluon.constexpr_function
def _field(bits, low):
    """Return how far the fields that start at bit `low` of two packed words are shifted down, and their mask then."""
    down = low // _POSITIONS * _POSITIONS
    mask = ((1 << bits) - 1) << (low - down)
    return down, f"0x{mask << 16 | mask:08X}"


@gluon.constexpr_function
def _code_asm(bits, low):
    """Return the PTX that takes the fields that start at bit `low` out of two packed words."""
    down, pair = _field(bits, low)
    if down == 0:
        return f"and.b32 $0, $1, {pair};"
    if bits == _POSITIONS:
        return "prmt.b32 $0, $1, 0, 0x4341;"  # the upper byte of each word
    return f"{{.reg .b32 t; shr.b32 t, $1, {down}; and.b32 $0, t, {pair};}}"


@gluon.constexpr_function
def code_weight(low_bit, low):
    """Return the factor that makes codes of one plane, whose fields start at bit `low`, count in CODE_UNITs."""
    return 2.0 ** (_exponent(low_bit) - low % _POSITIONS)


@gluon.jit
def lane_weights(LANES: gl.constexpr, BITS: gl.constexpr, LOW_BIT: gl.constexpr, layout: gl.constexpr):
    """Return that factor for every lane of a row, [lanes], float16."""
    return weights_of(gl.arange(0, LANES, layout=layout), LANES, BITS, LOW_BIT).to(gl.float16)


@gluon.jit
def weights_of(lane, LANES: gl.constexpr, BITS: gl.constexpr, LOW_BIT: gl.constexpr):
    """Return that factor for some of a row's lanes, float32."""
    low = lane // (LANES // planes(BITS)) * BITS
    return gl.exp2((_exponent(LOW_BIT) - low % _positions()).to(gl.float32))


@gluon.jit
def codes_of_plane(words, BITS: gl.constexpr, PLANE: gl.constexpr):
    """Return the codes of one plane of packed words, float16, as the words lie."""
    return gl.inline_asm_elementwise(
        _code_asm(BITS, PLANE * BITS), "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def joined_codes(words, BITS: gl.constexpr, layout: gl.constexpr):
    """Return the codes of every lane, float16, as an MMA's operand.

    words: [rows, words] to [rows, lanes], or [warps, words, columns] to [warps, lanes, columns].
    """
    parts = ()
    for plane in gl.static_range(planes(BITS)):
        parts = parts + (codes_of_plane(words, BITS, plane),)
    for _ in gl.static_range(planes(BITS).bit_length() - 1):
        pairs = ()
        for i in gl.static_range(0, len(parts), 2):
            if len(words.shape) == 2:
                pairs = pairs + (side_by_side(parts[i], parts[i + 1]),)
            else:
                pairs = pairs + (one_behind_other(parts[i], parts[i + 1], 1),)
        parts = pairs
    return gl.convert_layout(parts[0], layout, assert_trivial=True)


@gluon.constexpr_function
def _restoring_asm(bits, low):
    """Return the PTX that takes fields as ``code * 2**position``, and restores them with scales and offsets."""
    down, pair = _field(bits, low)
    shift = f"shr.b32 t, $1, {down};" if down else "mov.b32 t, $1;"
    taken = f"lop3.b32 t, t, {pair}, 0x64006400, 0xEA;"
    unbiased = "mov.b32 bias, 0xE400E400; add.rn.f16x2 t, t, bias;"
    return f"{{.reg .b32 t, bias; {shift} {taken} {unbiased} fma.rn.f16x2 $0, t, $2, $3;}}"


@gluon.jit
def restored(words, scale, offset, BITS: gl.constexpr, PLANE: gl.constexpr):
    """Return ``code * 2**position * scale + offset`` of one plane of packed words, float16, rounded once."""
    return gl.inline_asm_elementwise(
        _restoring_asm(BITS, PLANE * BITS), "=r,r,r,r", [words, scale, offset], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.constexpr_function
def plane_step(bits, plane):
    """Return the factor that makes ``code * 2**position`` of a plane a code."""
    return 2.0 ** -(plane * bits % _POSITIONS)
