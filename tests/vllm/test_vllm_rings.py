"""Tail blocks change hands without the worker being told: whoever is admitted finds them forgotten.

``TailState`` is watched here, and compared with what the scheduler hands out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from compare import same_bits
from engine_process import Models
from plan import Answer, Request
from serving import Scheduled, Serving, serving
from tiny_models import LLAMA_GROUP_3, prompt

from kvarn.core.tail import TailState

TILE = 128
# With the null block that vLLM keeps; a request takes two for its tail.
BLOCKS = 18
GROWING = 4
# Every float32 of it is 0.747.
GARBAGE = 0x3F


@dataclass(slots=True)
class Watched:
    """Calls of a TailState, in order.

    Args:
        forgotten: rings of every call of `forget`.
        begun: rings, committed lengths and own starts of every call of `begin`.
        order: names of the calls.
        forgets: whether `forget` does what it is there for.
    """

    forgotten: list[list[int]] = field(default_factory=list)
    begun: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    forgets: bool = True


@pytest.fixture(scope="module")
def watched(patch: pytest.MonkeyPatch) -> Watched:
    """Watch all that follows in this module."""
    seen = Watched()
    forget, begin = TailState.forget, TailState.begin

    def watched_forget(state: TailState, rows: torch.Tensor) -> None:
        seen.order.append("forget")
        seen.forgotten.append(rows.tolist())
        if seen.forgets:
            forget(state, rows)

    def watched_begin(
        state: TailState, rows: torch.Tensor, prefix_lens: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own_start, continued = begin(state, rows, prefix_lens, *rest)
        seen.order.append("begin")
        seen.begun.append((rows.tolist(), prefix_lens.tolist(), own_start.tolist()))
        return own_start, continued

    patch.setattr(TailState, "forget", watched_forget)
    patch.setattr(TailState, "begin", watched_begin)
    return seen


@dataclass(frozen=True, slots=True)
class Recycled:
    """A request that hits what another wrote and gets its ring, and the same request once more.

    Args:
        rings: rings of the two.
        own_start: first position that the request is taken to have written itself.
        answer: what it was answered.
        again: what it was answered in a ring that was surely forgotten.
    """

    rings: tuple[int, int]
    own_start: int
    answer: Answer
    again: Answer


def _recycle(engine: Serving, watched: Watched, seed: int, *, forgets: bool) -> Recycled:
    """Let a request end where a tile does, so that its ring's state fits the next one's hit, and spoil its memory."""
    assert engine.flush()
    engine.ask(Request("owner", prompt(2 * TILE, seed), 1))
    (owner,) = engine.steps[-1].admitted.values()
    for block in engine.steps[-1].blocks["owner"][-1]:
        engine.tail.kv_cache[block].fill_(GARBAGE)
    watched.forgets = forgets
    watched.begun.clear()
    request = Request("heir", prompt(300, seed), 6)
    answer = engine.ask(request)["heir"]
    watched.forgets = True
    (ring,), _, (own_start,) = watched.begun[0]
    assert answer.cached_tokens == 2 * TILE
    return Recycled((owner, ring), own_start, answer, engine.ask(request)["heir"])


@dataclass(frozen=True, slots=True)
class Run:
    """Requests that were preempted, what was called in their steps, and two recycled rings."""

    steps: list[Scheduled]
    preemptions: int
    forgotten: list[list[int]]
    order: list[str]
    forgotten_ring: Recycled
    remembered_ring: Recycled


@pytest.fixture(scope="module")
def run(models: Models, watched: Watched) -> Run:
    """Preempt requests, then recycle rings, in default mode: canonical mode reads no row that may be old."""
    with serving(models.path(LLAMA_GROUP_3), num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=256) as engine:
        engine.ask(*(Request(f"growing/{i}", prompt(240 + 3 * i, 20 + i), 40) for i in range(GROWING)))
        return Run(
            steps=list(engine.steps),
            preemptions=engine.preemptions.total(),
            forgotten=list(watched.forgotten),
            order=list(watched.order),
            forgotten_ring=_recycle(engine, watched, 50, forgets=True),
            remembered_ring=_recycle(engine, watched, 51, forgets=False),
        )


def test_rings_of_started_and_resumed_requests_are_forgotten_and_no_others(run: Run) -> None:
    admitted = [sorted(step.admitted.values()) for step in run.steps if step.admitted]
    assert run.preemptions > 0
    assert sum(map(len, admitted)) == GROWING + run.preemptions
    assert [sorted(rings) for rings in run.forgotten] == admitted


def test_rings_are_forgotten_before_the_step_that_writes_them(run: Run) -> None:
    calls = [["forget", "begin"] if step.admitted else ["begin"] for step in run.steps]
    assert run.order == [call for step in calls for call in step]


def test_request_in_a_recycled_ring_reads_nothing_of_its_owner(run: Run) -> None:
    recycled = run.forgotten_ring
    assert recycled.rings[0] == recycled.rings[1], "another block was handed out: the test measures nothing"
    assert recycled.own_start == 2 * TILE
    same_bits(recycled.answer, recycled.again)


def test_state_alone_would_take_the_owner_for_the_request(run: Run) -> None:
    """Why rings are forgotten: length, page and writer all fit, and the memory is no longer what they say."""
    recycled = run.remembered_ring
    assert recycled.rings[0] == recycled.rings[1]
    assert recycled.own_start == 0
    assert recycled.answer.logprobs[0] != recycled.again.logprobs[0]
