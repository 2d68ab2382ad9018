"""The oracle: quantise, pack and restore one tile in plain torch, float32. Kernels are optimisations of this file.

Method: Mueller et al., "KVarN: Variance-Normalized KV-Cache Quantization", arXiv 2606.03458, sections on rotation,
variance normalisation and rounding. `PUBLISHED` is the released recipe, kept as the yardstick; `DEFAULT` is ours.
"""

import math
from dataclasses import dataclass

import torch

from kvarn.core.layout import Field, TileLayout

_STD_MIN = 1e-3
_STD_MAX = 1e3
_LOG_SCALE_MAX = 10.0
_SCALE_MIN = 1e-10
_FP16_MAX = 65504.0
# Best of a sweep by KL on a real model. Keys of 3 bits and more lose by clipping: their peaks carry the logits.
_KEY_CLIPS = {2: 0.80}
_VALUE_CLIPS = {2: 0.80, 3: 0.85, 4: 0.95}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tile is normalised and rounded.

    Args:
        iterations: rounds of variance normalisation.
        log_scale_min: floor of a log scale. The released -0.3 keeps tiles with a standard deviation below 0.74 from
            being normalised at all.
        scale_free: divide the tile by its own standard deviation first, so that the floor doesn't matter.
        margin: share by which a later iterate must be more even to replace an earlier one. Above zero, rounding in
            another order (another GPU) can hardly change the choice.
        clipped: let codes span only part of each row's range, about its centre: coarse codes lose less that way.
    """

    iterations: int
    log_scale_min: float
    scale_free: bool
    margin: float
    clipped: bool

    def key_clip(self, bits: int) -> float:
        """Return the share of a key row's range that codes of this width span."""
        return _KEY_CLIPS.get(bits, 1.0) if self.clipped else 1.0

    def value_clip(self, bits: int) -> float:
        """Return the share of a value row's range that codes of this width span."""
        return _VALUE_CLIPS.get(bits, 1.0) if self.clipped else 1.0


PUBLISHED = Recipe(iterations=8, log_scale_min=-0.3, scale_free=False, margin=0.0, clipped=False)
DEFAULT = Recipe(iterations=8, log_scale_min=-10.0, scale_free=True, margin=0.01, clipped=True)


@dataclass(frozen=True, slots=True)
class QuantisedTile:
    """One oriented tile: ``x[row, col] = (code * scale[row] + offset[row]) * across[col]``.

    Args:
        codes: [..., rows, cols], int32.
        scale: [..., rows], float16.
        offset: [..., rows], float16.
        across: [..., cols], float16.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    across: torch.Tensor

    def restore(self) -> torch.Tensor:
        """Return the values, [..., rows, cols], float32."""
        rows = self.codes.float() * self.scale.float()[..., None] + self.offset.float()[..., None]
        return rows * self.across.float()[..., None, :]


def _imbalance(x: torch.Tensor) -> torch.Tensor:
    """Return how uneven the standard deviations of rows and of columns are; 2 is perfect. [..., 1, 1]."""
    total = torch.zeros(())
    for dim in (-1, -2):
        std = x.std(dim=dim)
        total = total + std.amax(dim=-1) / std.amin(dim=-1).clamp_min(1e-8)
    return total[..., None, None]


def normalise(x: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Find row and column scales that even out the standard deviations.

    Args:
        x: [..., rows, cols], float32.
        recipe: bounds and number of rounds.

    Returns:
        Log scales of rows [..., rows, 1] and of columns [..., 1, cols] of the most even iterate, identity included.
    """
    row = torch.zeros_like(x[..., :, :1])
    col = torch.zeros_like(x[..., :1, :])
    best_row, best_col, best = row, col, _imbalance(x)
    for _ in range(recipe.iterations):
        std = (x * torch.exp(-row) * torch.exp(-col)).std(dim=-2, keepdim=True).clamp(_STD_MIN, _STD_MAX)
        col = (col + torch.log(std)).clamp(recipe.log_scale_min, _LOG_SCALE_MAX)
        std = (x * torch.exp(-row) * torch.exp(-col)).std(dim=-1, keepdim=True).clamp(_STD_MIN, _STD_MAX)
        row = (row + torch.log(std)).clamp(recipe.log_scale_min, _LOG_SCALE_MAX)
        score = _imbalance(x * torch.exp(-row) * torch.exp(-col))
        better = score <= best * (1.0 - recipe.margin)
        best_row, best_col = torch.where(better, row, best_row), torch.where(better, col, best_col)
        best = torch.where(better, score, best)
    return best_row, best_col


def quantise_oriented(x: torch.Tensor, bits: int, clip: float, recipe: Recipe) -> QuantisedTile:
    """Quantise an oriented tile: one scale and offset a row, one scale a column.

    Codes are computed with the rounded fp16 vectors, so that a reader restores exactly what was rounded. The tile's
    amplitude is split evenly between the row and the column vectors, so that neither leaves fp16.

    Args:
        x: [..., rows, cols], float32, already rotated. Keys: rows are channels. Values: rows are tokens.
        bits: width of a code.
        clip: share of each row's range, about its centre, that the codes span.
        recipe: normalisation.
    """
    sigma = torch.ones_like(x[..., :1, :1])
    if recipe.scale_free:
        std = x.flatten(-2).std(dim=-1)[..., None, None]
        sigma = torch.where(std > 0, std, sigma)
    x = x / sigma
    _, col = normalise(x, recipe)
    x = x * sigma
    column = torch.exp(col)
    peak = (x / column).abs().amax(dim=(-2, -1), keepdim=True)
    balance = torch.sqrt(peak / column.amax(dim=-1, keepdim=True))
    across = (column * torch.where(peak > 0, balance, torch.ones_like(peak))).clamp_max(_FP16_MAX).half()
    rows = x / _no_zero(across.float())
    low, high = rows.amin(dim=-1), rows.amax(dim=-1)
    middle, reach = (low + high) * 0.5, (high - low) * (0.5 * clip)
    levels = 2**bits - 1
    scale = (2.0 * reach / levels).clamp(_SCALE_MIN, _FP16_MAX).half()
    offset = (middle - reach).clamp(-_FP16_MAX, _FP16_MAX).half()
    codes = torch.round((rows - offset.float()[..., None]) / _no_zero(scale.float())[..., None])
    return QuantisedTile(codes.clamp(0, levels).to(torch.int32), scale, offset, across.squeeze(-2))


def _no_zero(x: torch.Tensor) -> torch.Tensor:
    """Replace zeros, which only constant rows and empty tiles have, by one."""
    return torch.where(x == 0, torch.ones_like(x), x)


def quantise_tile(
    k: torch.Tensor, v: torch.Tensor, layout: TileLayout, recipe: Recipe = DEFAULT
) -> tuple[QuantisedTile, QuantisedTile]:
    """Quantise rotated K and V rows of one tile.

    Args:
        k: [..., tile_tokens, head_dim], float32, rotated.
        v: the same shape.
        layout: widths.
        recipe: `DEFAULT` or `PUBLISHED`.

    Returns:
        The key tile (rows are channels) and the value tile (rows are tokens).
    """
    key = quantise_oriented(k.float().transpose(-1, -2), layout.key_bits, recipe.key_clip(layout.key_bits), recipe)
    return key, quantise_oriented(v.float(), layout.value_bits, recipe.value_clip(layout.value_bits), recipe)


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


def pack_record(key: QuantisedTile, value: QuantisedTile, layout: TileLayout) -> torch.Tensor:
    """Lay a quantised tile out as a record, [..., record_bytes], uint8. Padding bytes are zero."""
    parts = [
        pack_codes(key.codes.transpose(-1, -2), layout.key_fields),
        *(vector.contiguous().view(torch.uint8) for vector in (key.scale, key.offset, key.across)),
        pack_codes(value.codes.transpose(-1, -2), layout.value_fields),
        *(vector.contiguous().view(torch.uint8) for vector in (value.scale, value.offset, value.across)),
    ]
    record = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(record, (0, layout.record_bytes - layout.payload_bytes))


def unpack_record(record: torch.Tensor, layout: TileLayout) -> tuple[QuantisedTile, QuantisedTile]:
    """Undo `pack_record`: record [..., record_bytes], uint8, gives the key tile and the value tile."""

    def vector(offset: int, length: int) -> torch.Tensor:
        return record[..., offset : offset + 2 * length].contiguous().view(torch.float16)

    channels, tokens = layout.head_dim, layout.tile_tokens
    key = QuantisedTile(
        unpack_codes(record, layout.key_fields, tokens).transpose(-1, -2),
        vector(layout.k_scale_offset, channels),
        vector(layout.k_offset_offset, channels),
        vector(layout.k_token_offset, tokens),
    )
    value = QuantisedTile(
        unpack_codes(record, layout.value_fields, channels).transpose(-1, -2),
        vector(layout.v_scale_offset, tokens),
        vector(layout.v_offset_offset, tokens),
        vector(layout.v_channel_offset, channels),
    )
    return key, value


def encode(k: torch.Tensor, v: torch.Tensor, layout: TileLayout, recipe: Recipe = DEFAULT) -> torch.Tensor:
    """Turn rotated rows [..., tile_tokens, head_dim] into records [..., record_bytes], uint8."""
    return pack_record(*quantise_tile(k, v, layout, recipe), layout)


def decode_record(record: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn records [..., record_bytes] into rotated K and V rows [..., tile_tokens, head_dim], float32."""
    key, value = unpack_record(record, layout)
    return key.restore().transpose(-1, -2), value.restore()


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, logit_cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over restored rows.

    Args:
        q: [rows, q_heads, head_dim].
        k: [positions, kv_heads, head_dim]; v: the same shape.
        visible: [rows, positions], bool.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.

    Returns:
        Output [rows, q_heads, head_dim] and natural log-sum-exp [rows, q_heads], in q's dtype. A row that sees
        nothing gives zeros and -inf.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, q_heads // kv_heads, head_dim)
    scores = torch.einsum("rhgd,phd->rhgp", grouped, k) * scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)[..., None])
    out = torch.einsum("rhgp,phd->rhgd", weights, v)
    return out.reshape(rows, q_heads, head_dim), lse.reshape(rows, q_heads)
