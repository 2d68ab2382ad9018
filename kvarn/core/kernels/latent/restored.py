"""Restore rows of latent records inside a kernel, to fp16: one unpacking for the product with queries and the other."""

import triton
import triton.language as tl

from kvarn.core.kernels.unpack import BIAS, lane_weights, unpack


@triton.jit
def _fma(a, b, c, USE_ASM: tl.constexpr):
    """Return a * b + c in fp16, rounded once; two elements an instruction on NVIDIA."""
    if USE_ASM:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        out = (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(tl.float16)
    return out


@triton.jit
def _field_codes(
    record, token, BITS: tl.constexpr, LOW_BIT: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Return a field's part of codes, [tokens, channels], fp16, exact."""
    words_ptr = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2
    words = tl.load(words_ptr + token[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    weights = lane_weights(BITS, LOW_BIT, WORDS)[None, :]
    return _fma(unpack(words, BITS, USE_ASM), weights.to(tl.float16), (weights * -BIAS).to(tl.float16), USE_ASM)


@triton.jit
def restored_channels(
    record, token, DIM: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr, USE_ASM: tl.constexpr
):
    """Return ``code * scale + offset`` of some tokens of a tile, [tokens, DIM], fp16."""
    halfs = record.to(tl.pointer_type(tl.float16)) + tl.arange(0, DIM)[None, :]
    codes = _field_codes(record, token, FIELDS[0][0], FIELDS[0][1], FIELDS[0][2], FIELDS[0][3], USE_ASM)
    if len(FIELDS) == 2:
        codes += _field_codes(record, token, FIELDS[1][0], FIELDS[1][1], FIELDS[1][2], FIELDS[1][3], USE_ASM)
    return _fma(codes, tl.load(halfs + SCALES[0] // 2), tl.load(halfs + SCALES[1] // 2), USE_ASM)


@triton.jit
def restored_rope(
    record, token, ROPE: tl.constexpr, ROPE_START: tl.constexpr, ROPE_FIELDS: tl.constexpr, ROPE_SCALES: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Return the rope part of some tokens of a tile, [tokens, ROPE], fp16."""
    if len(ROPE_FIELDS) == 0:
        halfs = record.to(tl.pointer_type(tl.float16)) + ROPE_START // 2
        rope = tl.load(halfs + token[:, None] * ROPE + tl.arange(0, ROPE)[None, :])
    else:
        rope = restored_channels(record, token, ROPE, ROPE_FIELDS, ROPE_SCALES, USE_ASM)
    return rope
