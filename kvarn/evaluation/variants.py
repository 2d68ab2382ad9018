"""Variants of KVarN's own quantiser, named by what differs: for ablations, sweeps, and choices made layer by layer."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace

import torch

from kvarn.core.hadamard import rotate, sign_matrix
from kvarn.core.layout import KEY_GROUP_TOKENS
from kvarn.core.reference import key_clip, quantise_rows, quantise_values, value_clip
from kvarn.errors import KVarNError
from kvarn.evaluation.methods import TILE, Method
from kvarn.evaluation.names import VARIANT_MARK

_HALF_BITS = 16
# What each part of the quantiser is worth: one thing different from the preset in every line.
ABLATION = (
    "k4v2:key_order=0",
    "k4v2:key_order=1",
    "k4v2:key_group=128",
    "k4v2:value_clip=1",
    "k4v2:value_stretched=0",
    "k4v2:value_order=1",
    "k4v2:sinks=0",
    "k4v2:tail=0",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A uniform quantiser of tiles as in `core.reference`, with everything in it left open.

    Args:
        key_bits: of a key code; value_bits: of a value code.
        key_order: channels that are rotated together in keys, equally far apart; 1 for no rotation, 0 for all.
        value_order: the same for values.
        key_group: tokens that share a key channel's scale and offset.
        key_clip: share of a range that key codes span; negative for the preset's. value_clip: the same for values.
        key_refit: rounds of fitting scale and offset of keys to their codes by least squares, and rounding again.
        value_stretched: whether values keep their length, 1 or 0.
        tail: newest tokens that stay exact.
        sinks: first tokens that stay exact.
    """

    key_bits: int
    value_bits: int
    key_order: int = 4
    value_order: int = 0
    key_group: int = KEY_GROUP_TOKENS
    key_clip: float = -1.0
    value_clip: float = -1.0
    key_refit: int = 0
    value_stretched: int = 1
    tail: int = TILE
    sinks: int = 4

    def restore(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a tile as they come back, [..., TILE, head_dim], float32."""
        clip_k = key_clip(self.key_bits) if self.key_clip < 0 else self.key_clip
        clip_v = value_clip(self.value_bits, v.shape[-1]) if self.value_clip < 0 else self.value_clip
        channels = rotate_strided(k, self.key_order).unflatten(-2, (-1, self.key_group)).transpose(-1, -2)
        keys = _round(channels, self.key_bits, clip_k, self.key_refit).transpose(-1, -2).flatten(-3, -2)
        quantise = quantise_values if self.value_stretched else quantise_rows
        values = quantise(rotate_strided(v, self.value_order), self.value_bits, clip_v).restore()
        return (
            rotate_strided(keys, self.key_order, inverse=True),
            rotate_strided(values, self.value_order, inverse=True),
        )

    def bits(self, head_dim: int) -> float:
        """Return the bits a number of K and V, scales and offsets included."""
        return self.key_bits + self.value_bits + 2 * _HALF_BITS / self.key_group + 2 * _HALF_BITS / head_dim


def variant(name: str) -> Method:
    """Return the variant of a name: bits, a colon, and what differs, e.g. ``k4v2:key_order=0,value_clip=1``.

    Raises:
        KVarNError: the name is not like that.
    """
    bits, _, changes = name.partition(VARIANT_MARK)
    names = {field.name: type(field.default) for field in fields(Variant) if field.default is not MISSING}
    try:
        key_bits, value_bits = (int(digits) for digits in bits.removeprefix("k").split("v"))
        pairs = [change.split("=") for change in changes.split(",") if change]
        made = replace(Variant(key_bits, value_bits), **{key: names[key](value) for key, value in pairs})
    except (KeyError, ValueError) as error:
        raise KVarNError(
            f"{name!r} is no variant; write it like k4v2:key_order=0,value_clip=1, with {', '.join(names)}."
        ) from error
    return Method(name, made.restore, made.bits, made.tail, made.sinks)


def rotate_strided(x: torch.Tensor, order: int, *, inverse: bool = False) -> torch.Tensor:
    """Rotate channels that stand head_dim / order apart together, in float32.

    Args:
        x: [..., head_dim].
        order: channels of one rotation, a power of two; 0 for all of head_dim.
        inverse: undo the rotation.
    """
    order = order or x.shape[-1]
    if order == x.shape[-1]:
        return rotate(x, inverse=inverse)
    # the matrix of a power of two is symmetric: it undoes itself
    parts = x.float().unflatten(-1, (order, -1))
    signs = sign_matrix(order).to(x.device) / math.sqrt(order)
    return torch.einsum("ij,...jc->...ic", signs, parts).flatten(-2)


def _round(rows: torch.Tensor, bits: int, clip: float, refits: int) -> torch.Tensor:
    quantised = quantise_rows(rows, bits, clip)
    codes, restored = quantised.codes.float(), quantised.restore()
    for _ in range(refits):
        middle, centre = codes.mean(dim=-1, keepdim=True), rows.mean(dim=-1, keepdim=True)
        spread = (codes - middle).square().sum(dim=-1, keepdim=True)
        slope = ((codes - middle) * (rows - centre)).sum(dim=-1, keepdim=True) / spread.clamp_min(1e-6)
        slope = torch.where(spread > 0, slope, quantised.scale.float()[..., None]).half().float()
        offset = (centre - slope * middle).half().float()
        codes = ((rows - offset) / slope.clamp_min(1e-7)).round().clamp(0, 2**bits - 1)
        restored = codes * slope + offset
    return restored
