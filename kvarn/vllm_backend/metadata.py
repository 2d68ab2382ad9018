"""From what vLLM says of a step to the core's Step. No host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from kvarn.core.block_steps import BlockBatch, block_steps, equal_rows
from kvarn.core.prefill_plan import PrefillPlan, plan_prefill
from kvarn.vllm_backend import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from kvarn.core.block_pool import BlockPool
    from kvarn.core.step import Step


class TileMetadata(BlockBatch, AttentionMetadata):
    """A step as vLLM tells it; the first layer makes the core's description of it, inside the graph if there is one."""


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
        table, starts = common.block_table_tensor, common.query_start_loc_cpu
        most = self._tail.shape.draft_tokens + 1
        rows_each = equal_rows(starts, common.max_query_len, common.num_actual_tokens, most)
        if rows_each:
            return TileMetadata(common.seq_lens, common.query_start_loc, table, common.num_reqs * rows_each, rows_each)
        blocks = -(-common.max_seq_len // self.kv_cache_spec.block_size)
        table, tokens = table[:, :blocks], int(starts[-1])
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
    pool: BlockPool, metadata: TileMetadata, tail_blocks: torch.Tensor, group: int, widest: int | None = None
) -> list[Step]:
    """Return `block_steps`, unless a graph is captured that it can't be in.

    Raises:
        RuntimeError: requests have different numbers of rows in a graph.
    """
    captured = metadata.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured and not metadata.rows_each:
        raise RuntimeError(
            "vLLM captures a step whose requests have different numbers of rows, which KVarN can't replay. "
            'Pass --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', and please report the flags.'
        )
    return block_steps(pool, metadata, tail_blocks, group, widest)
