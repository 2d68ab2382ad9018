"""Traffic that starts and ends requests all the time, over few beginnings, so that tiles are sealed and found again."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.serving import trail
from benchmarks.serving.engines import Engine

_BEGINNINGS = 8


def drive(
    engine: Engine, folder: str, ranks: int, steps: int, text: list[int], requests: int, longest: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Keep an engine busy until its ranks have gone so many steps; return the trail of each.

    Args:
        engine: the engine.
        folder: that KVARN_BENCH_TRAIL names.
        ranks: ranks of the engine.
        steps: at least so many.
        text: ids that prompts are cut from.
        requests: of a wave, more than run at once.
        longest: tokens of the longest prompt.
        new_tokens: tokens of the longest answer.

    Raises:
        RuntimeError: a wave made no step.
    """
    wave, reports = 0, []
    while not reports or reports[0].steps < steps:
        prompts, lengths = _wave(text, random.Random(wave), requests, longest, new_tokens)
        engine.generate(prompts, lengths)
        before, reports = reports, trail.ask(engine, Path(folder), ranks, wave)
        if before and before[0].steps >= reports[0].steps - 1:
            raise RuntimeError(f"A wave of {requests} requests made no step that was seen.")
        print(f"wave {wave}: {[report.steps for report in reports]} steps, {reports[0].sealed} tiles", flush=True)
        wave += 1
    return [asdict(report) for report in reports]


def _wave(
    text: list[int], chance: random.Random, requests: int, longest: int, new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Return prompts of all lengths, each a common beginning and more of its own, and lengths of answers."""
    prompts = []
    for _ in range(requests):
        length = chance.randint(longest // 4, longest)
        beginning = min(chance.choice((longest // 2, longest // 4)), length - 1)
        start = chance.randrange(_BEGINNINGS) * (len(text) // _BEGINNINGS)
        own = chance.randrange(len(text) - longest)
        prompts.append([*_cut(text, start, beginning), *_cut(text, own, length - beginning)])
    return prompts, [chance.randint(1, new_tokens) for _ in range(requests)]


def _cut(text: list[int], start: int, count: int) -> list[int]:
    return [text[(start + i) % len(text)] for i in range(count)]
