"""TableSteps: from an engine's table of slots to Steps, where every row of the table has a ring of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvarn import env
from kvarn.core.cache import LayerCache
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step, chunk_step, verify_step
from kvarn.core.tail import TailState, owner_tags


class TableSteps:
    """Describes forward passes.

    Args:
        state: ring owners and sinks of the pool.
        layers: the pool's layers, for scrubbing.
        slots: [rows, most tokens], the engine's table: slot of every token of every request.
        group: query heads of one kv head.
        plan: plans a step's long chunks by the lengths of prefixes and chunks, `plan_prefill`; None to have none.
        columns: the argument `widest` of what makes steps, if it is not the default.
    """

    def __init__(
        self,
        state: TailState,
        layers: list[LayerCache[Any]],
        slots: torch.Tensor,
        group: int,
        plan: Callable[[list[int], list[int]], PrefillPlan | None] | None,
        **columns: int,
    ) -> None:
        self.state = state
        self.layers = layers
        self._slots = slots
        self._group = group
        self._plan = plan
        self._columns = columns
        self._page_starts = torch.arange(0, slots.shape[1], state.config.tile_tokens, device=slots.device)

    def uniform(self, rows: torch.Tensor, seq_lens: torch.Tensor, rows_each: int) -> Step:
        """Describe a decode step, or one that verifies as many drafts of every request. Graph-safe: yes.

        Args:
            rows: [requests], rows of the table.
            seq_lens: [requests], tokens after the step, drafts included.
            rows_each: tokens that each request gets.
        """
        table = self.pages(rows)
        return verify_step(self.state, rows.int(), seq_lens.int(), table, self._group, rows_each, **self._columns)

    def ragged(
        self,
        rows: torch.Tensor,
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        host_prefix_lens: list[int],
        host_query_lens: list[int],
        request_ids: Sequence[str],
    ) -> Step:
        """Describe a prefill chunk or a mixed batch.

        Args:
            rows: [requests], rows of the table.
            prefix_lens: [requests], tokens in the cache before the step.
            seq_lens: [requests], tokens after it.
            host_prefix_lens: prefix_lens on the host.
            host_query_lens: rows of each request in the step.
            request_ids: names of the requests.

        Raises:
            RuntimeError: an earlier chunk neither continued its tail ring nor started on a tile boundary.
        """
        self.state.check_faults()
        most = max(prefix + new for prefix, new in zip(host_prefix_lens, host_query_lens, strict=True))
        tags = owner_tags(request_ids)
        plan = None if self._plan is None else self._plan(host_prefix_lens, host_query_lens)
        step, continued = chunk_step(
            self.state,
            rows.int(),
            prefix_lens.int(),
            seq_lens.int(),
            tags.to(rows.device, non_blocking=True),
            self.pages(rows, -(-most // self.state.config.tile_tokens)),
            self._group,
            sum(host_query_lens),
            plan,
            **self._columns,
        )
        self.state.watch_faults()
        if env.scrub():
            self._scrub(rows, continued)
        return step

    def pages(self, rows: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Copy the physical pages of some requests, so that layers never read the scheduler's table.

        Args:
            rows: [requests], rows of the table.
            most: pages of the longest; None for as many as the table has.

        Returns:
            [requests, pages], int32.
        """
        slots = self._slots[rows[:, None], self._page_starts[None, :most]]
        return (slots // self.state.config.tile_tokens).int()

    def _scrub(self, rows: torch.Tensor, continued: torch.Tensor) -> None:
        keep = continued[:, None, None, None, None]
        for layer in self.layers:
            layer.tails[rows] = torch.where(keep, layer.tails[rows], 0)
