"""Trail: in every rank of an engine, a running hash of all that decides what is sealed and what is read.

The worker that starts an engine imports this module, and so do the processes which the engine starts. If
KVARN_BENCH_TRAIL names a folder, the core's builders of steps are watched there. What is hashed stands on the device,
so the hash is made there too, by integer operations without a sync, which a graph holds like the step's own. It is
read when the worker asks: it puts a file into the folder, lets the engine answer a short prompt, and every rank writes
its trail where it describes that prompt's chunk, which no graph holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvarn.core import block_steps
from kvarn.core.cache import CacheConfig
from kvarn.core.step import Step
from kvarn.core.table_steps import TableSteps
from kvarn.core.tail import TailState
from kvarn.patching import wrap_once

FOLDER = "KVARN_BENCH_TRAIL"
PERIOD = 1000
_PERIODS = 4096
_ASK = "ask"
_WAIT_S = 60
# More rows than a step of drafts has, less than a tile, so that no prefix hit takes them away.
_PROBE_TOKENS = 32
# Odd numbers of 64 bits, as in splitmix64; signed, as torch has them.
_GOLDEN, _FIRST, _SECOND = (odd - (1 << 64) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SEAL_KEY = 1 << 60


class Trail:
    """What a rank decided, step by step. All tensors int64 on the device; padding of graphs doesn't count.

    Args:
        config: of the cache.
        device: where the steps are.
        period: steps after each of which the hash is kept.
    """

    def __init__(self, config: CacheConfig[Any], device: torch.device | str, period: int = PERIOD) -> None:
        self._config = config
        self._period = period
        self._hash, self._steps, self._sealed, self._hits = torch.zeros(4, 1, dtype=torch.int64, device=device)
        self._kept = torch.zeros(_PERIODS, dtype=torch.int64, device=device)

    def add(self, step: Step, rings: torch.Tensor) -> None:
        """Hash one step. Graph-safe: yes.

        Args:
            step: the step.
            rings: [columns, requests], every ring of each request.
        """
        tile_tokens, table = self._config.tile_tokens, step.block_table.long()
        tiles = (step.seq_lens.clamp_min(1).long() + tile_tokens - 1) // tile_tokens
        real = table.gather(1, tiles[:, None] - 1).squeeze(1) >= self._config.tiles_per_block
        fields = [step.prefix_lens, step.seq_lens, step.own_start, step.sink_slots, *rings]
        hashed = _hash_of(torch.stack([field.long() for field in fields], dim=1), real[:, None])
        in_use = torch.arange(table.shape[1], device=table.device) < tiles[:, None]
        hashed += _hash_of(table, real[:, None] & in_use, 1 << 40)

        request, tile = step.seal_request.long(), step.seal_tile.long()
        seals = (tile >= 0) & real[request]
        page = table[request, tile.clamp_min(0)]
        hashed += (_mixed(_mixed((request << 24) + tile + _SEAL_KEY) + page) * seals).sum()
        if step.plan is not None:  # who reads what raw
            hashed += (step.plan.short_tokens << 20) + step.plan.most_short

        any_real = real.any()
        mixed = _mixed(self._hash * _GOLDEN + hashed + int(step.rows_in_ring))
        self._hash.copy_(torch.where(any_real, mixed, self._hash))
        period = (self._steps // self._period).clamp_max(_PERIODS - 1)
        self._kept.scatter_(0, period, self._hash)
        self._steps += any_real
        self._sealed += seals.sum()
        self._hits += (real & (step.own_start == step.prefix_lens) & (step.prefix_lens > 0)).sum()

    def read(self) -> Report:
        """Return what was hashed up to now. Syncs."""
        steps = int(self._steps)
        hashes = self._kept[: -(-steps // self._period)].tolist()
        return Report(steps, hashes, int(self._sealed), int(self._hits))


@dataclass(frozen=True, slots=True)
class Report:
    """A trail, read.

    Args:
        steps: steps with requests.
        hashes: after every period of steps, and after the last step.
        sealed: tiles sealed.
        hits: requests that began after tiles which others wrote.
    """

    steps: int
    hashes: list[int]
    sealed: int
    hits: int


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of every number."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


def _hash_of(rows: torch.Tensor, counts: torch.Tensor, key: int = 0) -> torch.Tensor:
    """Return the sum of a mixture of every number that counts with its place."""
    at = [torch.arange(size, device=rows.device) for size in rows.shape]
    places = key + (at[0][:, None] << 20) + at[1]
    return (_mixed(_mixed(places * _GOLDEN) + rows) * counts).sum()


class Watch:
    """The trails of this process, one for the state of each pool.

    Args:
        folder: where questions come from and reports go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trails: list[tuple[TailState, Trail]] = []
        self._answered = ""

    def install(self) -> None:
        """Watch the core's builders of steps."""

        def made(make: Callable[..., None], state: TailState, *args: Any, **options: Any) -> None:
            make(state, *args, **options)
            self._trails.append((state, Trail(state.config, state.ring_end.device)))

        def described(describe: Callable[..., Step], steps: TableSteps, *args: Any, chunk: bool) -> Step:
            step = describe(steps, *args)
            self._note(steps.state, [step], chunk=chunk)
            return step

        wrap_once(TailState, "__init__", made)
        wrap_once(TableSteps, "uniform", partial(described, chunk=False))
        wrap_once(TableSteps, "ragged", partial(described, chunk=True))
        in_blocks = block_steps.block_steps

        def watched(pool: Any, batch: Any, *args: Any) -> list[Step]:
            steps = in_blocks(pool, batch, *args)
            self._note(pool.state, steps, chunk=not batch.rows_each)
            return steps

        # adapters take it from there when they are imported, which is later
        block_steps.block_steps = watched

    def _note(self, state: TailState, steps: list[Step], *, chunk: bool) -> None:
        trail = next(trail for known, trail in self._trails if known is state)
        trail.add(steps[0], torch.stack([step.rows for step in steps]))
        if chunk:
            self._answer(trail)

    def _answer(self, trail: Trail) -> None:
        """Write the trail that a question made longer, once for each question."""
        try:
            asked = (self._folder / _ASK).read_text()
        except FileNotFoundError:
            return
        if asked != self._answered:
            self._answered = asked
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            _write_whole(self._folder / f"{asked}.{rank}.json", json.dumps(asdict(trail.read())))


def watch_if_asked() -> None:
    """Watch this process's steps if the environment names a folder."""
    if os.environ.get(FOLDER):
        Watch(Path(os.environ[FOLDER])).install()


def ask(engine: Any, folder: Path, ranks: int, question: int) -> list[Report]:
    """Return what every rank hashed up to now; the engine must be idle.

    Args:
        engine: the engine.
        folder: that KVARN_BENCH_TRAIL names.
        ranks: ranks of the engine.
        question: its number; no number is asked twice.

    Raises:
        TimeoutError: a rank wrote nothing.
    """
    _write_whole(folder / _ASK, str(question))
    engine.generate([[question % 100 + 50] * _PROBE_TOKENS], 1)
    files = [folder / f"{question}.{rank}.json" for rank in range(ranks)]
    until = time.monotonic() + _WAIT_S
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() > until:
            raise TimeoutError(f"After {_WAIT_S} s no rank had written {', '.join(missing)}.")
        time.sleep(0.05)
    (folder / _ASK).unlink()
    return [Report(**json.loads(file.read_text())) for file in files]


def first_difference(reports: list[Report]) -> int | None:
    """Return in which period of steps the ranks first differ, from 0; None if all of them are equal."""
    for period, hashes in enumerate(zip(*(report.hashes for report in reports), strict=False)):
        if len(set(hashes)) > 1:
            return period
    return None if len({report.steps for report in reports}) == 1 else min(len(report.hashes) for report in reports)


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
