"""TableSteps: from an engine's table of slots to Steps, where every row of the table has a ring of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvarn import env
from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.chunk_step import chunk_step
from kvarn.core.launch import launch
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step, int32_words, verify_step
from kvarn.core.tail import TailState, owner_tags

# Pages that one program finds.
_PAGES_BLOCK = 128


class TableSteps:
    """Describes forward passes of an engine that lets requests find a page in its prefix cache after it was filled.

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
        self.pages(torch.zeros(1, dtype=torch.int32, device=slots.device), 1)  # compiles its kernel

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
            rows,
            prefix_lens,
            seq_lens,
            tags.to(rows.device, non_blocking=True),
            self.pages(rows, -(-most // self.state.config.tile_tokens)),
            self._group,
            sum(host_query_lens),
            plan,
            hits_inside=False,
            **self._columns,
        )
        self.state.watch_faults()
        if env.scrub():
            self._scrub(rows, continued)
        return step

    def pages(self, rows: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Copy the physical pages of some requests, so that layers never read the scheduler's table. Graph-safe: yes.

        Args:
            rows: [requests], rows of the table.
            most: pages of the longest; None for as many as the table has.

        Returns:
            [requests, pages], int32.
        """
        tile, tokens = self.state.config.tile_tokens, self._slots.shape[1]
        pages = -(-tokens // tile) if most is None else most
        if not runs_triton(self._slots):
            return pages_reference(rows, self._slots, pages, tile)
        from kvarn.core.kernels.table import pages_kernel

        out = torch.empty(rows.shape[0], pages, dtype=torch.int32, device=rows.device)
        words, row_words = int32_words(rows)
        launch(
            pages_kernel, (-(-pages // _PAGES_BLOCK), rows.shape[0]),
            words, self._slots, out, row_words, pages, self._slots.stride(0), out.stride(0), G=tile, BLOCK=_PAGES_BLOCK,
        )  # fmt: skip
        return out

    def _scrub(self, rows: torch.Tensor, continued: torch.Tensor) -> None:
        keep = continued[:, None, None, None, None]
        for layer in self.layers:
            layer.tails[rows] = torch.where(keep, layer.tails[rows], 0)


def pages_reference(rows: torch.Tensor, slots: torch.Tensor, pages: int, tile_tokens: int) -> torch.Tensor:
    """Find the pages by operations of torch."""
    starts = torch.arange(pages, device=slots.device) * tile_tokens
    return (slots[rows.long()[:, None], starts] // tile_tokens).int()
