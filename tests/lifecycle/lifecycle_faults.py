"""Faults: small lies in TailState, Step and the read rule, to show that the oracle bites."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from lifecycle_world import TILE, Setting

from kvarn.core import chunk_step as chunk_step_module
from kvarn.core import step as step_module
from kvarn.core.cache import CacheConfig
from kvarn.core.step import Step
from kvarn.core.tail import TailState

Inject = Callable[[pytest.MonkeyPatch], None]
# What TailState.begin is called with for a chunk; a decode step names no owner.
_CHUNK_ARGUMENTS = 5


@dataclass(frozen=True)
class Fault:
    """A fault, the world that it is put into, and the forward passes within which it must be found."""

    inject: Inject
    within_steps: int
    setting: Setting = Setting(64, 4)
    ring_tokens: int | None = None

    @property
    def config(self) -> CacheConfig:
        config = self.setting.config
        if self.ring_tokens is not None:  # past the constructor's own check
            object.__setattr__(config, "ring_tokens", self.ring_tokens)
        return config


def _record_end(change: Callable[[CacheConfig, Step], tuple[CacheConfig, Step]], shift: int = 0) -> Inject:
    """Ask the read rule for another config or step, or move its answer."""
    real = step_module.record_end

    def lie(config: CacheConfig, step: Step, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return (real(*change(config, step), request, position) + shift).clamp_min(0)

    return lambda patch: patch.setattr(step_module, "record_end", lie)


def _steps(change: Callable[[Step], Step]) -> Inject:
    """Alter what both kinds of step describe."""
    chunk, decode = chunk_step_module.chunk_step, step_module.decode_step

    def inject(patch: pytest.MonkeyPatch) -> None:
        def lying_chunk(*args: object) -> tuple[Step, torch.Tensor]:
            step, continued = chunk(*args)
            return change(step), continued

        patch.setattr(chunk_step_module, "chunk_step", lying_chunk)
        patch.setattr(step_module, "decode_step", lambda *args: change(decode(*args)))

    return inject


def _before_chunk(change: Callable[..., None]) -> Inject:
    """Alter the state just before a chunk is compared with it."""
    real = TailState.begin

    def lie(state: TailState, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(args) == _CHUNK_ARGUMENTS:
            change(state, *args)
        return real(state, *args)

    return lambda patch: patch.setattr(TailState, "begin", lie)


def _forget_owner(state: TailState, rows: torch.Tensor, _p: object, _s: object, _t: object, tags: torch.Tensor) -> None:
    state.owner[rows.long()] = tags


def _forget_length(state: TailState, rows: torch.Tensor, prefix: torch.Tensor, *_: torch.Tensor) -> None:
    state.ring_end[rows.long()] = state.sure_end[rows.long()] = prefix


def _forget_page(
    state: TailState, rows: torch.Tensor, prefix: torch.Tensor, _s: object, table: torch.Tensor, _t: object
) -> None:
    state.ring_page[rows.long()] = state.sure_page[rows.long()] = state._page_of(table, prefix - 1)


def _forget_writer(
    state: TailState, rows: torch.Tensor, prefix: torch.Tensor, _s: object, table: torch.Tensor, _t: object
) -> None:
    state.page_writer[state._page_of(table, prefix - 1).long()] = rows


def _together(*forgets: Callable[..., None]) -> Callable[..., None]:
    def forget(*arguments: torch.Tensor) -> None:
        for each in forgets:
            each(*arguments)

    return forget


def _always_continued(state: TailState, rows: torch.Tensor, prefix: torch.Tensor, *rest: torch.Tensor) -> None:
    _forget_owner(state, rows, prefix, *rest)
    _forget_length(state, rows, prefix)
    _forget_page(state, rows, prefix, *rest)
    _forget_writer(state, rows, prefix, *rest)


def _own_start_zero(patch: pytest.MonkeyPatch) -> None:
    _steps(lambda step: replace(step, own_start=torch.zeros_like(step.own_start)))(patch)


def _decode_keeps_no_end(patch: pytest.MonkeyPatch) -> None:
    real = TailState.begin

    def lie(state: TailState, rows: torch.Tensor, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(args) == _CHUNK_ARGUMENTS - 1:
            return real(state, rows, *args)
        return state.own_start[rows.long()], torch.ones_like(rows, dtype=torch.bool)

    patch.setattr(TailState, "begin", lie)


def _sinks(*, gives: bool, counts: bool, takes_any: bool = False) -> Inject:
    """A page map that doesn't give slots back, doesn't count them, or hands them to any page."""

    def lie(state: TailState, position: torch.Tensor, page: torch.Tensor) -> None:
        for at, p in zip(position.tolist(), page.tolist(), strict=True):
            if at % TILE or not p:
                continue
            held, first = int(state.page_slot[p]) >= 0, at == 0 or takes_any
            if not first and held and gives:
                state.free_slots[int(state.free_count)] = state.page_slot[p]
                state.page_slot[p] = -1
                state.free_count += int(counts)
            elif first and not held and int(state.free_count) > 0:
                state.free_count -= 1
                state.page_slot[p] = state.free_slots[int(state.free_count)]

    return lambda patch: patch.setattr(TailState, "_update_sinks_reference", lie)


def _only_accepted_drafts(patch: pytest.MonkeyPatch) -> None:
    real = TailState.begin

    def lie(state: TailState, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state.sure_end.copy_(state.ring_end)
        return real(state, *args)

    patch.setattr(TailState, "begin", lie)


def _nothing(_patch: pytest.MonkeyPatch) -> None:
    """Leave the code as it is; the fault is in the config."""


# Comparisons that `TailState.begin` makes for a chunk, left out. Who wrote the page last tells a wrong length or page,
# mostly, so those are left out together with it.
FORGETS: dict[str, Inject] = {
    "owner": _before_chunk(_forget_owner),
    "length": _before_chunk(_together(_forget_length, _forget_writer)),
    "page": _before_chunk(_together(_forget_page, _forget_writer)),
    "writer": _before_chunk(_forget_writer),
}

FAULTS = {
    "records one tile too far": Fault(_record_end(lambda c, s: (c, s), TILE), 50),
    "records one tile too short": Fault(_record_end(lambda c, s: (c, s), -TILE), 300),
    "tail one row too short": Fault(_record_end(lambda c, s: (replace(c, tail_tokens=c.tail_tokens - 1), s)), 300),
    "provisional tiles read": Fault(
        _record_end(lambda c, s: (c, replace(s, prefix_lens=s.seq_lens))), 300, Setting(0, 0)
    ),
    "own_start always 0": Fault(_own_start_zero, 200),
    "continued always": Fault(_before_chunk(_always_continued), 200),
    "owner not compared": Fault(FORGETS["owner"], 3000),
    "page not compared": Fault(FORGETS["page"], 8000),
    "decode doesn't move the end": Fault(_decode_keeps_no_end, 200),
    "sink slot not released": Fault(_sinks(gives=False, counts=True), 300),
    "sink slot released, not counted": Fault(_sinks(gives=True, counts=False), 300),
    "sink slot for any page": Fault(_sinks(gives=True, counts=True, takes_any=True), 50),
    "sinks of the second page": Fault(_steps(lambda s: replace(s, sink_slots=s.sink_slots.roll(1))), 100),
    "sealed tile shifted": Fault(
        _steps(lambda s: replace(s, seal_tile=torch.where(s.seal_tile >= 0, s.seal_tile + 1, -1))), 50
    ),
    "seal lost": Fault(_steps(lambda s: replace(s, seal_tile=torch.full_like(s.seal_tile, -1))), 50),
    "ring one row short": Fault(_nothing, 300, ring_tokens=TILE + 64 - 1),
    "ring one row short of drafts": Fault(_nothing, 3000, Setting(64, 4, drafts=5), ring_tokens=TILE + 64 + 5 - 1),
    "rejected drafts lose the ring": Fault(_only_accepted_drafts, 50, Setting(64, 4, drafts=5)),
    "ring without the tail": Fault(_nothing, 300, ring_tokens=TILE),
    "chunk stored before it is read": Fault(_steps(lambda s: replace(s, rows_in_ring=True)), 100),
    "queries shifted": Fault(_steps(lambda s: replace(s, query_start=s.query_start + 1)), 5),
    "token positions shifted": Fault(_steps(lambda s: replace(s, token_position=s.token_position + 1)), 5),
    "a query row without a task": Fault(_steps(lambda s: replace(s, rows_per_task=s.rows_per_task - 1)), 5),
}
