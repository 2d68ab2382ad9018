"""A paged cache of 16-bit or fp8 rows, as peers read it: shuffled blocks of 16 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.gate import checked_requests, dense_expected, relative_rms, token_rows
from benchmarks.kernels.inputs import Inputs, take_rows
from benchmarks.kernels.timing import copies_needed

BLOCK_TOKENS = 16
FP8 = torch.float8_e4m3fn
_HOLLOW_BLOCKS = 64
# Rounding of weights and output in the model dtype.
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Copies of a paged cache and the one page table that all of them share.

    Args:
        inputs: the case.
        keys: a copy each, [blocks, BLOCK_TOKENS, kv_heads, head_dim].
        values: the same.
        table: [batch, blocks of the longest request], int32; 0 past the end of a request.
        blocks_each: blocks of each request.
    """

    inputs: Inputs
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    table: torch.Tensor
    blocks_each: list[int]

    @property
    def copies(self) -> int:
        """Copies of the cache."""
        return len(self.keys)

    def indptr(self, unit_counts: list[int]) -> torch.Tensor:
        """Return where each request starts if each has that many units, [batch + 1], int32, on the device."""
        starts = torch.tensor([0, *unit_counts], dtype=torch.int64).cumsum(0)
        return starts.to(device=self.table.device, dtype=torch.int32)

    def slots(self) -> torch.Tensor:
        """Return the places of all tokens, request after request, [tokens], int64: block times size plus offset."""
        offset = torch.arange(BLOCK_TOKENS, device=self.table.device)
        places = (self.table.long()[:, :, None] * BLOCK_TOKENS + offset).flatten(1)
        return torch.cat([row[:length] for row, length in zip(places, self.inputs.case.seq_lens, strict=True)])

    def error(self, out: torch.Tensor) -> float:
        """Return the relative RMS error of an output [batch * q_len, q_heads, head_dim] over copy 0, in float64."""
        case = self.inputs.case
        requests = checked_requests(case.seq_lens)
        want = []
        for request in requests:
            blocks = self.table[request, : self.blocks_each[request]].long()
            k, v = (_rows(x[0], blocks)[: case.seq_lens[request]] for x in (self.keys, self.values))
            rows = token_rows([request], case.q_len, out.device)
            want.append(dense_expected(self.inputs.q[rows], k, v, self.inputs.scale, case.logit_cap))
        return relative_rms(out[token_rows(requests, case.q_len, out.device)], torch.cat(want))


def paged_cache(inputs: Inputs, l2_bytes: int, dtype: torch.dtype, hollow: bool) -> PagedCache:
    """Fill a paged cache with random rows of the pools.

    Args:
        inputs: the case and its pools.
        l2_bytes: size of the L2, which sets the number of copies.
        dtype: of the cache: the model's or FP8.
        hollow: few blocks stand for all, and one copy.
    """
    case = inputs.case
    pools = [pool.to(dtype) for pool in (inputs.key_pool, inputs.value_pool)]
    read = 2 * sum(case.seq_lens) * case.kv_heads * case.head_dim * dtype.itemsize
    copies = 1 if hollow else copies_needed(read, l2_bytes)
    each = [-(-length // BLOCK_TOKENS) for length in case.seq_lens]
    blocks = _HOLLOW_BLOCKS if hollow else sum(each)
    table = shuffled_table(inputs, each, blocks)
    keys, values = ([_filled(inputs, pool, blocks) for _ in range(copies)] for pool in pools)
    return PagedCache(inputs, keys, values, table, each)


def shuffled_table(inputs: Inputs, blocks_each: list[int], blocks: int) -> torch.Tensor:
    """Give every request blocks in random order, [batch, most blocks], int32; with too few blocks, some are shared."""
    order = torch.randperm(sum(blocks_each), generator=inputs.generator, device=inputs.device).int() % blocks
    table = torch.zeros(len(blocks_each), max(blocks_each), dtype=torch.int32, device=inputs.device)
    for row, own in zip(table, order.split(blocks_each), strict=True):
        row[: own.shape[0]] = own
    return table


def _filled(inputs: Inputs, pool: torch.Tensor, blocks: int) -> torch.Tensor:
    rows = torch.empty(blocks * BLOCK_TOKENS, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    take_rows(pool, inputs.pick(rows.shape[0]), rows)
    return rows.view(blocks, BLOCK_TOKENS, *pool.shape[1:])


def _rows(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the rows of some blocks in order, [positions, kv_heads, head_dim], in a dtype that torch computes in."""
    words = torch.empty(blocks.shape[0], *cache.shape[1:], dtype=cache.dtype, device=cache.device)
    take_rows(cache, blocks, words)
    return words.flatten(0, 1).float()
