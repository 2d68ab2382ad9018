"""The oracle: quantise, pack and restore one tile in plain torch, float32. Kernels are optimisations of this file.

Values are rotated as in Mueller et al., "KVarN: Variance-Normalized KV-Cache Quantization", arXiv 2606.03458. What that
paper does next, evening out standard deviations over tokens and channels, is not here: on real models it changed
nothing for values and did harm to keys, while groups of tokens with key scales of their own, for the same bytes, help
(docs/performance-log.md, 21). The published recipe stands in `kvarn.evaluation.published`, to be compared with.
"""

import math
from dataclasses import dataclass

import torch

from kvarn.core.layout import KEY_GROUP_TOKENS, Field, TileLayout

_SCALE_MIN = 1e-7
_FP16_MAX = 65504.0
# Attention multiplies queries of up to 64, and weights of up to 128, by a sixteenth of a scale, in fp16.
SCALE_MAX = 8000.0
# Share of the range of a group's keys that codes span, about its centre: two bits lose less by clipping peaks than by
# wide steps, more bits lose by clipping, since peaks carry the logits. Best of a sweep by KL on a real model.
_KEY_CLIPS = {2: 0.80}
# Of a token's values, rotated and hence about normal: how many standard deviations codes span, by KL on four models,
# and at how many the largest of a row's channels is expected (docs/performance-log.md, 49).
_VALUE_REACH = {2: 1.69, 3: 2.0, 4: 2.5}
_LARGEST_OF = {64: 2.34, 96: 2.49, 128: 2.59, 192: 2.73, 256: 2.83, 512: 3.04}
# Half of a row's range in the integers that a row's length is measured in: sums over 512 channels fit 32 bits.
_LENGTH_STEPS = 1023


def key_clip(bits: int) -> float:
    """Return the share of the range of a group's keys in a channel that codes of this width span."""
    return _KEY_CLIPS.get(bits, 1.0)


def value_clip(bits: int, head_dim: int) -> float:
    """Return the share of the range of a token's values that codes of this width span before they are stretched."""
    return min(1.0, _VALUE_REACH[bits] / _LARGEST_OF[head_dim]) if bits in _VALUE_REACH else 1.0


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of codes: ``x[row, lane] = code * scale[row] + offset[row]``.

    Args:
        codes: [..., rows, lanes], int32.
        scale: [..., rows], float16.
        offset: [..., rows], float16.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def restore(self) -> torch.Tensor:
        """Return the values, [..., rows, lanes], float32."""
        return self.codes.float() * self.scale.float()[..., None] + self.offset.float()[..., None]


def quantise_rows(x: torch.Tensor, bits: int, clip: float) -> QuantisedRows:
    """Quantise rows to a uniform grid, a scale and an offset each.

    Codes are computed with the rounded fp16 numbers, so that a reader restores exactly what was rounded. A range of
    more than ``SCALE_MAX * (2**bits - 1)`` is clipped about its centre.

    Args:
        x: [..., rows, lanes], float32.
        bits: width of a code.
        clip: share of each row's range, about its centre, that the codes span.
    """
    levels = 2**bits - 1
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    middle, reach = (low + high) * 0.5, (high - low) * (0.5 * clip)
    scale = (2.0 * reach / levels).clamp(_SCALE_MIN, SCALE_MAX).half()
    reach = torch.minimum(reach, torch.full_like(reach, SCALE_MAX * levels * 0.5))
    offset = (middle - reach).clamp(-_FP16_MAX, _FP16_MAX).half()
    share = ((x - offset.float()) * (scale.float() * levels).reciprocal()).clamp(0.0, 1.0)
    return QuantisedRows((share * levels).round().to(torch.int32), scale.squeeze(-1), offset.squeeze(-1))


def quantise_values(x: torch.Tensor, bits: int, clip: float) -> QuantisedRows:
    """Quantise rows to a uniform grid, clipped about the middle of their range and then stretched to keep their length.

    Clipping shortens large values, all alike, and what attention sums over many tokens averages random errors away but
    keeps such a common one. So the scale is the one by which a row's error is orthogonal to the row, both without the
    middle: ``|u|**2 / (u . q)`` times that of the codes (docs/performance-log.md, 48). Both sums are of integers, hence
    the same bits in any order.

    Args:
        x: [..., rows, lanes], float32; at most 512 lanes.
        bits: width of a code.
        clip: share of each row's range, about its middle, that the codes span before they are stretched.
    """
    levels = 2**bits - 1
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    middle, flat = (low + high) * 0.5, high <= low
    half = ((high - low) * 0.5).clamp_min(_SCALE_MIN * levels / (2.0 * clip))
    y = ((x - middle) * half.reciprocal()).nan_to_num(0.0)
    codes = ((y * (0.5 / clip) + 0.5).clamp(0.0, 1.0) * levels).round().to(torch.int32)
    length = (y * _LENGTH_STEPS).round().to(torch.int32)
    squares = (length * length).sum(dim=-1, keepdim=True)
    along = (length * (2 * codes - levels)).sum(dim=-1, keepdim=True).clamp_min(1)
    stretch = squares.float() / along.float()
    scale = (stretch * half * (2.0 / _LENGTH_STEPS)).clamp(_SCALE_MIN, SCALE_MAX).half()
    offset = torch.where(flat, middle, middle - scale.float() * (levels * 0.5)).clamp(-_FP16_MAX, _FP16_MAX).half()
    return QuantisedRows(codes.masked_fill(flat, 0), scale.squeeze(-1), offset.squeeze(-1))


def quantise_tile(k: torch.Tensor, v: torch.Tensor, layout: TileLayout) -> tuple[QuantisedRows, QuantisedRows]:
    """Quantise rotated K and V rows of one tile.

    Args:
        k: [..., tile_tokens, head_dim], float32, rotated.
        v: the same shape.
        layout: widths.

    Returns:
        Keys, [..., key_groups, head_dim] rows of a group's tokens; and values, [..., tile_tokens] rows of channels.
    """
    grouped = k.float().reshape(*k.shape[:-2], layout.key_groups, KEY_GROUP_TOKENS, layout.head_dim).transpose(-1, -2)
    key = quantise_rows(grouped, layout.key_bits, key_clip(layout.key_bits))
    return key, quantise_values(v.float(), layout.value_bits, value_clip(layout.value_bits, layout.head_dim))


def pack_codes(codes: torch.Tensor, fields: tuple[Field, ...]) -> torch.Tensor:
    """Plane-pack codes.

    Args:
        codes: [..., rows, lanes], int32.
        fields: where each part of a code goes.

    Returns:
        [..., bytes], uint8: the words of the first field, row after row, then those of the next.
    """
    parts = []
    for field in fields:
        part = (codes >> field.low_bit) & (2**field.bits - 1)
        part = part.unflatten(-1, (field.planes, field.words))
        shifts = torch.arange(field.planes, device=codes.device, dtype=torch.int32) * field.bits
        words = (part << shifts[:, None]).sum(dim=-2)
        signed = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
        parts.append(signed.flatten(-2).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_codes(record: torch.Tensor, fields: tuple[Field, ...], rows: int) -> torch.Tensor:
    """Undo `pack_codes`.

    Args:
        record: [..., record_bytes], uint8.
        fields: where each part stands inside the record.
        rows: rows of the oriented code matrix.

    Returns:
        [..., rows, lanes], int32.
    """
    codes = torch.zeros((), dtype=torch.int32, device=record.device)
    for field in fields:
        end = field.offset_bytes + rows * field.words * 2
        words = record[..., field.offset_bytes : end].contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        words = words.reshape(*words.shape[:-1], rows, 1, field.words)
        shifts = torch.arange(field.planes, device=record.device, dtype=torch.int32) * field.bits
        part = (words >> shifts[:, None]) & (2**field.bits - 1)
        codes = codes + (part.flatten(-2) << field.low_bit)
    return codes


def pack_record(key: QuantisedRows, value: QuantisedRows, layout: TileLayout) -> torch.Tensor:
    """Lay a quantised tile out as a record, [..., record_bytes], uint8. Padding bytes are zero."""
    parts = [
        pack_codes(key.codes.transpose(-1, -2).flatten(-3, -2), layout.key_fields),
        *(vector.flatten(-2).contiguous().view(torch.uint8) for vector in (key.scale, key.offset)),
        pack_codes(value.codes.transpose(-1, -2), layout.value_fields),
        *(vector.contiguous().view(torch.uint8) for vector in (value.scale, value.offset)),
    ]
    record = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(record, (0, layout.record_bytes - layout.payload_bytes))


def unpack_record(record: torch.Tensor, layout: TileLayout) -> tuple[QuantisedRows, QuantisedRows]:
    """Undo `pack_record`: record [..., record_bytes], uint8, gives the keys and the values."""

    def vector(offset: int, *shape: int) -> torch.Tensor:
        part = record[..., offset : offset + 2 * math.prod(shape)].contiguous().view(torch.float16)
        return part.reshape(*record.shape[:-1], *shape)

    channels, tokens, groups = layout.head_dim, layout.tile_tokens, layout.key_groups
    key_codes = unpack_codes(record, layout.key_fields, tokens)
    key = QuantisedRows(
        key_codes.reshape(*record.shape[:-1], groups, KEY_GROUP_TOKENS, channels).transpose(-1, -2),
        vector(layout.k_scale_offset, groups, channels),
        vector(layout.k_offset_offset, groups, channels),
    )
    value = QuantisedRows(
        unpack_codes(record, layout.value_fields, channels).transpose(-1, -2),
        vector(layout.v_scale_offset, tokens),
        vector(layout.v_offset_offset, tokens),
    )
    return key, value


def encode(k: torch.Tensor, v: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Turn rotated rows [..., tile_tokens, head_dim] into records [..., record_bytes], uint8."""
    return pack_record(*quantise_tile(k, v, layout), layout)


def decode_record(record: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn records [..., record_bytes] into rotated K and V rows [..., tile_tokens, head_dim], float32."""
    key, value = unpack_record(record, layout)
    return key.restore().transpose(-1, -2).flatten(-3, -2), value.restore()


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, logit_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend over restored rows.

    Args:
        q: [rows, q_heads, head_dim].
        k: [positions, kv_heads, head_dim].
        v: [positions, kv_heads, value width].
        visible: [rows, positions], bool.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        sink_logits: [q_heads], any float dtype: logit of a key that every row sees, whose value is zero; neither scaled
            nor capped.

    Returns:
        Output [rows, q_heads, value width] and natural log-sum-exp [rows, q_heads], in q's dtype, with the sink. A row
        that sees nothing gives zeros and the sink's logit, -inf without one.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, q_heads // kv_heads, head_dim)
    scores = torch.einsum("rhgd,phd->rhgp", grouped, k) * scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(lse.dtype).view(kv_heads, -1))
    weights = torch.exp(scores - torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)[..., None])
    out = torch.einsum("rhgp,phd->rhgd", weights, v)
    return out.reshape(rows, q_heads, -1), lse.reshape(rows, q_heads)
