"""Inputs: keys with outlier channels and a mean of their own, Gaussian values, and queries to match. Never zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.kernels.cases import Case
from kvarn.presets import get_preset

# Distinct rows, in tiles: caches are filled from these, in random order.
POOL_TILES = 64
# As in trained models: a few channels of each head carry large keys whose mean all tokens share.
_OUTLIER_CHANNELS = 4
_OUTLIER_MEAN = 20.0
_OUTLIER_SPREAD = 4.0
_MEAN_SPREAD = 0.5
# Standard deviation of the logits inside a softmax: a token in some fifty counts.
_LOGIT_STD = 2.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What KVarN and its peers attend to and with.

    Args:
        case: the shape.
        q: [batch * q_len, q_heads, head_dim], model dtype; the rows of a request are neighbours.
        k: [batch * q_len, kv_heads, head_dim], model dtype: the step's own rows; v: the same.
        key_pool: [rows, kv_heads, head_dim], model dtype: rows that caches are filled with; value_pool: the same.
        generator: source of every further random number, on the device.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Where all of it lives."""
        return self.q.device

    @property
    def scale(self) -> float:
        """Factor on q . k."""
        return 1.0 / math.sqrt(self.case.head_dim)

    def seq_lens(self) -> torch.Tensor:
        """Return the tokens of each request after the step, [batch], int32, on the device."""
        return torch.tensor(self.case.seq_lens, dtype=torch.int32, device=self.device)

    def pick(self, *shape: int, limit: int | None = None) -> torch.Tensor:
        """Return random indices below limit (default: into the pools), int64."""
        limit = self.key_pool.shape[0] if limit is None else limit
        return torch.randint(limit, shape, generator=self.generator, device=self.device)


def make_inputs(case: Case, device: torch.device, pool_tiles: int = POOL_TILES, seed: int = 0) -> Inputs:
    """Draw the inputs of a case.

    Args:
        case: the shape.
        device: where.
        pool_tiles: distinct tiles of rows.
        seed: of all random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    heads, dim, dtype = case.kv_heads, case.head_dim, getattr(torch, case.dtype)
    rows = case.batch * case.q_len

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    mean, spread = normal(heads, dim) * _MEAN_SPREAD, torch.ones(heads, dim, device=device)
    outliers = torch.rand(heads, dim, generator=generator, device=device).argsort(dim=-1)[:, :_OUTLIER_CHANNELS]
    mean.scatter_(1, outliers, _OUTLIER_MEAN * normal(heads, _OUTLIER_CHANNELS).sign())
    spread.scatter_(1, outliers, _OUTLIER_SPREAD)
    # rms of q . (k - mean) / sqrt(dim) over tokens is that of q's channels times that of the spread
    q_std = _LOGIT_STD / spread.square().mean().sqrt()

    def keys(count: int) -> torch.Tensor:
        return (mean + spread * normal(count, heads, dim)).to(dtype)

    pool = pool_tiles * get_preset(case.preset).tile_tokens
    return Inputs(
        case=case,
        q=(q_std * normal(rows, case.q_heads, dim)).to(dtype),
        k=keys(rows),
        v=normal(rows, heads, dim).to(dtype),
        key_pool=keys(pool),
        value_pool=normal(pool, heads, dim).to(dtype),
        generator=generator,
    )


def take_rows(pool: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows of a pool, whatever their dtype, 8 bytes at a time.

    Args:
        pool: [rows, ...], contiguous.
        index: [n], int64.
        out: [n, ...], contiguous, the same dtype and row shape.
    """
    words = pool.reshape(pool.shape[0], -1).view(torch.int64)
    torch.index_select(words, 0, index, out=out.reshape(out.shape[0], -1).view(torch.int64))
