"""From what vLLM says of a step to the core's Step. No host sync."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from kvarn.core.prefill_plan import PrefillPlan, plan_prefill
from kvarn.core.step import Step, aligned_ints, chunk_step, verify_step
from kvarn.vllm_backend import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from kvarn.vllm_backend.tails import TilePool


@dataclass
class TileMetadata(AttentionMetadata):
    """A step as vLLM tells it; the first layer makes the core's description of it, inside the graph if there is one.

    Args:
        seq_lens: [requests], int32, tokens after the step; 0 for padding.
        query_start: [requests + 1], int32.
        block_table: [requests, blocks], int32.
        num_tokens: rows of the step that hold tokens, padding of a graph included.
        rows_each: rows of every request in a decode or verify step; 0 in any other.
        plan: of the step's long chunks.
        steps: the step for every column of the tail's block table.
    """

    seq_lens: torch.Tensor
    query_start: torch.Tensor
    block_table: torch.Tensor
    num_tokens: int
    rows_each: int
    plan: PrefillPlan | None = None
    steps: list[Step] | None = None


class TileMetadataBuilder(AttentionMetadataBuilder[TileMetadata]):
    """Describes steps. No host sync."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compat.require_watched()
        self._tail = compat.tail_of(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TileMetadata:
        """Note what a step is.

        Raises:
            RuntimeError: an earlier step found that a request had lost its open tile.
        """
        del common_prefix_len, fast_build
        common = common_attn_metadata
        state = self._tail.pool.state
        state.check_faults()
        state.watch_faults()
        rows_each = _rows_each(common, self._tail.shape.draft_tokens + 1)
        table = common.block_table_tensor
        if rows_each:
            return TileMetadata(common.seq_lens, common.query_start_loc, table, common.num_reqs * rows_each, rows_each)
        blocks = -(-common.max_seq_len // self.kv_cache_spec.block_size)
        table, tokens = table[:, :blocks], int(common.query_start_loc_cpu[-1])
        return TileMetadata(common.seq_lens, common.query_start_loc, table, tokens, 0, self._plan(common))

    def _plan(self, common: CommonAttentionMetadata) -> PrefillPlan | None:
        """Plan the step's long chunks. vLLM's lengths on the host are true for requests that are being prefilled."""
        if common.seq_lens_cpu_upper_bound is None:
            return None
        query_lens = common.query_start_loc_cpu.diff()
        prefix_lens = common.seq_lens_cpu_upper_bound - query_lens
        return plan_prefill(
            self._tail.pool.config,
            self._tail.flash,
            self._tail.raw_dtype,
            prefix_lens.tolist(),
            query_lens.tolist(),
            common.seq_lens.device,
            self._tail.token_numbers,
        )


def describe(
    pool: TilePool, metadata: TileMetadata, tail_blocks: torch.Tensor, group: int, widest: int | None = None
) -> list[Step]:
    """Return the core's description of a step for every column of the tail's block table. Graph-safe but for chunks.

    Args:
        pool: the caches.
        metadata: the step.
        tail_blocks: [requests, blocks of a tail], int32.
        group: query heads that read a record together.
        widest: query columns of a program, if not those of kernels over keys and values.
    """
    columns = {} if widest is None else {"widest": widest}
    rows = aligned_ints(*tail_blocks.shape[::-1], tail_blocks.device).copy_(tail_blocks.t())
    table = metadata.block_table
    tiles = pool.config.tiles_per_block
    if tiles > 1:
        table = (table[:, :, None] * tiles + torch.arange(tiles, dtype=torch.int32, device=table.device)).flatten(1)
    if metadata.rows_each:
        step = verify_step(pool.state, rows[0], metadata.seq_lens, table, group, metadata.rows_each, **columns)
    else:
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "vLLM captures a step whose requests have different numbers of rows, which KVarN can't replay. "
                'Pass --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', and please report the flags.'
            )
        prefix_lens = metadata.seq_lens - metadata.query_start.diff()
        step, _ = chunk_step(
            pool.state,
            rows[0],
            prefix_lens,
            metadata.seq_lens,
            None,
            table,
            group,
            metadata.num_tokens,
            metadata.plan,
            **columns,
        )
    return [replace(step, rows=column) for column in rows]


def _rows_each(common: CommonAttentionMetadata, most: int) -> int:
    """Return the rows of every request if all have as many, and no more than a verified one; else 0.

    Requests that pad a graph have none here, come last, and get as many.
    """
    rows = common.max_query_len
    if rows == 1:
        return 1
    starts = common.query_start_loc_cpu
    if rows > most or common.num_actual_tokens != common.num_reqs * rows or int(starts[-1]) % rows:
        return 0
    equal = torch.arange(0, starts.shape[0] * rows, rows, dtype=starts.dtype).clamp_max(starts[-1])
    return rows if torch.equal(starts, equal) else 0
