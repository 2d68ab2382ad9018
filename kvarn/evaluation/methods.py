"""Quantisers to compare with, in plain torch, each as its paper describes it: K and V of one tile in, restored out.

They only change values; what each would store is counted in bytes. KVarN itself is not here: it is evaluated through
its own records and kernels.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvarn.core.hadamard import rotate
from kvarn.core.reference import quantise_rows
from kvarn.evaluation import published

TILE = 128
# [batch, kv_heads, TILE, head_dim], float32, to the same shape
Restore = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_HALF_BITS = 16
_KIVI_GROUP = 32
_PUBLISHED_SINKS = 128
_CODEBOOK_POINTS = 1 << 14
_CODEBOOK_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Method:
    """A way to keep tiles.

    Args:
        name: what it is called.
        restore: K and V of a tile as they come back.
        bits: bits a number of K and V, all scales included.
        tail_tokens: newest tokens that stay exact.
        sink_tokens: first tokens that stay exact.
    """

    name: str
    restore: Restore
    bits: Callable[[int], float]
    tail_tokens: int = 128
    sink_tokens: int = 4

    def bytes_per_token_head(self, head_dim: int) -> float:
        """Return the bytes of one token and kv head, K and V."""
        return self.bits(head_dim) * head_dim / 8


UNCHANGED = Method("exact", lambda k, v: (k, v), lambda d: 32.0)


def methods() -> dict[str, Method]:
    """Return every method by name."""
    made = [
        *(_published(key_bits, value_bits) for key_bits, value_bits in ((4, 2), (4, 4), (2, 2))),
        *(_hadamard_rtn(key_bits, value_bits) for key_bits, value_bits in ((4, 2), (4, 4), (2, 2))),
        _kivi(4, 2),
        _kivi(2, 2),
        _turboquant(4, 4),
        _turboquant(4, 2),
        Method("int4-per-token", _both(lambda x: _uniform(x, 4, -1)), lambda d: 2 * (4 + 2 * _HALF_BITS / d)),
        Method("fp8-e4m3", _both(_fp8), lambda d: 16.0, tail_tokens=0, sink_tokens=0),
    ]
    return {method.name: method for method in made}


def _both(restore: Callable[[torch.Tensor], torch.Tensor]) -> Restore:
    return lambda k, v: (restore(k), restore(v))


def _published(key_bits: int, value_bits: int) -> Method:
    """The published recipe (arXiv 2606.03458) as shipped: the first 128 tokens exact, no newest ones."""

    def restore(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = published.restore_oriented(rotate(k).transpose(-1, -2), key_bits).transpose(-1, -2)
        values = published.restore_oriented(rotate(v), value_bits)
        return rotate(keys, inverse=True), rotate(values, inverse=True)

    def bits(head_dim: int) -> float:
        return published.bytes_of_tile(TILE, head_dim, key_bits, value_bits) * 8 / (TILE * head_dim)

    return Method(f"published-k{key_bits}v{value_bits}", restore, bits, 0, _PUBLISHED_SINKS)


def _hadamard_rtn(key_bits: int, value_bits: int) -> Method:
    """Whole rotation and rounding from end to end alone: keys by channel, values by token, scale and offset in fp16."""

    def restore(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = quantise_rows(rotate(k).transpose(-1, -2), key_bits, 1.0).restore().transpose(-1, -2)
        values = quantise_rows(rotate(v), value_bits, 1.0).restore()
        return rotate(keys, inverse=True), rotate(values, inverse=True)

    def bits(head_dim: int) -> float:
        return key_bits + value_bits + 2 * _HALF_BITS / TILE + 2 * _HALF_BITS / head_dim

    return Method(f"hadamard-rtn-k{key_bits}v{value_bits}", restore, bits)


def _kivi(key_bits: int, value_bits: int) -> Method:
    """KIVI (arXiv 2402.02750): keys by channel, values by token, in groups of 32, minimum and step in fp16."""

    def restore(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = _uniform(k.unflatten(-2, (-1, _KIVI_GROUP)), key_bits, -2).flatten(-3, -2)
        values = _uniform(v.unflatten(-1, (-1, _KIVI_GROUP)), value_bits, -1).flatten(-2)
        return keys, values

    bits = key_bits + value_bits + 2 * 2 * _HALF_BITS / _KIVI_GROUP
    return Method(f"kivi-k{key_bits}v{value_bits}", restore, lambda d: bits)


def _turboquant(key_bits: int, value_bits: int) -> Method:
    """TurboQuant (arXiv 2504.19874), its mean-squared-error form: rotate, normalise, an optimal scalar code a channel.

    The rotation is Hadamard's instead of a random one. A row keeps its norm in fp16.
    """

    def restore(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _spherical(k, key_bits), _spherical(v, value_bits)

    def bits(head_dim: int) -> float:
        return key_bits + value_bits + 2 * _HALF_BITS / head_dim

    return Method(f"turboquant-k{key_bits}v{value_bits}", restore, bits)


def _spherical(x: torch.Tensor, bits: int) -> torch.Tensor:
    y = rotate(x)
    norm = y.norm(dim=-1, keepdim=True).half().float()
    levels = gaussian_codebook(bits).to(x.device) / math.sqrt(x.shape[-1])
    edges = (levels[1:] + levels[:-1]) / 2
    return rotate(levels[torch.bucketize(y / norm.clamp_min(1e-12), edges)] * norm, inverse=True)


@functools.cache
def gaussian_codebook(bits: int) -> torch.Tensor:
    """Return the levels that quantise a standard normal variable with the least squared error (Lloyd and Max)."""
    quantiles = (torch.arange(_CODEBOOK_POINTS, dtype=torch.float64) + 0.5) / _CODEBOOK_POINTS
    points = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    levels = points[torch.linspace(0, _CODEBOOK_POINTS - 1, 2**bits + 2).long()[1:-1]]
    for _ in range(_CODEBOOK_ROUNDS):
        nearest = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add_(0, nearest, points)
        levels = sums / torch.bincount(nearest, minlength=len(levels)).clamp_min(1)
    return levels.float()


def _uniform(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Round to a uniform grid from the minimum to the maximum along a dimension, both vectors in fp16."""
    low = x.amin(dim=dim, keepdim=True).half().float()
    step = ((x.amax(dim=dim, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-7).half().float()
    return ((x - low) / step.clamp_min(1e-7)).round().clamp(0, 2**bits - 1) * step + low


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
