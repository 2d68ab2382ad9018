"""From SGLang's ForwardBatch to the core's Step. No kernels, no host sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvarn import env
from kvarn.core.cache import LayerCache
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step, chunk_step, decode_step, verify_step
from kvarn.core.tail import TailState, owner_tags

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class StepBuilder:
    """Describes forward passes to the core.

    Args:
        state: ring owners and sinks of the pool.
        layers: the pool's layers, for scrubbing.
        req_to_token: SGLang's table, [rows, max_context_len]: slot of every token of every request.
        group: query heads of one kv head.
        plan: plans a step's long chunks by the lengths of prefixes and chunks, `plan_prefill`.
        columns: the argument `widest` of what makes steps, if it is not the default.
    """

    def __init__(
        self,
        state: TailState,
        layers: list[LayerCache],
        req_to_token: torch.Tensor,
        group: int,
        plan: Callable[[list[int], list[int]], PrefillPlan | None],
        **columns: int,
    ) -> None:
        self._state = state
        self._layers = layers
        self._req_to_token = req_to_token
        self._group = group
        self._plan = plan
        self._columns = columns
        self._page_starts = torch.arange(0, req_to_token.shape[1], state.config.tile_tokens, device=req_to_token.device)

    def decode(self, batch: ForwardBatch) -> Step:
        """Describe a decode step. Graph-safe: yes."""
        rows = batch.req_pool_indices
        table = self._block_table(rows, self._page_starts.shape[0])
        return decode_step(self._state, rows.int(), batch.seq_lens.int(), table, self._group, **self._columns)

    def verify(self, batch: ForwardBatch) -> Step:
        """Describe a step that verifies as many drafts of every request. Graph-safe: yes.

        The batch's lengths are the committed ones: those of the drafts are not in them yet.
        """
        rows = batch.req_pool_indices
        rows_each = batch.input_ids.shape[0] // rows.shape[0]
        table = self._block_table(rows, self._page_starts.shape[0])
        lengths = (batch.seq_lens + rows_each).int()
        return verify_step(self._state, rows.int(), lengths, table, self._group, rows_each, **self._columns)

    def chunk(self, batch: ForwardBatch) -> Step:
        """Describe a prefill chunk or a mixed batch.

        Raises:
            RuntimeError: an earlier chunk neither continued its tail ring nor started on a tile boundary.
        """
        self._state.check_faults()
        rows = batch.req_pool_indices
        device = rows.device
        lengths = [a + b for a, b in zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)]
        tile_tokens = self._state.config.tile_tokens
        tags = owner_tags(batch.rids or [""] * batch.batch_size)
        step, continued = chunk_step(
            self._state,
            rows.int(),
            batch.extend_prefix_lens.int(),
            batch.seq_lens.int(),
            tags.to(device, non_blocking=True),
            self._block_table(rows, -(-max(lengths) // tile_tokens)),
            self._group,
            sum(batch.extend_seq_lens_cpu),
            self._plan(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu),
            **self._columns,
        )
        self._state.watch_faults()
        if env.scrub():
            self._scrub(rows, continued)
        return step

    def _block_table(self, rows: torch.Tensor, pages: int) -> torch.Tensor:
        """Copy the physical pages of some requests, so that layers never read the scheduler's table."""
        slots = self._req_to_token[rows[:, None], self._page_starts[None, :pages]]
        return (slots // self._state.config.tile_tokens).int()

    def _scrub(self, rows: torch.Tensor, continued: torch.Tensor) -> None:
        keep = continued[:, None, None, None, None]
        for layer in self._layers:
            layer.tails[rows] = torch.where(keep, layer.tails[rows], 0)
