"""Canonical mode with every row computed by itself: no schedule of vLLM changes an answer, to the last bit.

Requests run in batches, publish blocks for each other in the step that computes them, are preempted in a pool that is
too small for them, and are aborted everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from compare import same_bits
from engine_process import Models
from plan import Answer, Request
from row_by_row import compute_row_by_row
from serving import Scheduled, Serving, serving
from tiny_models import QWEN3_GROUP_2, prompt

TILE = 128
# With the null block that vLLM keeps; a request of these takes two for its tail.
BLOCKS = 18
CHUNK = 256
# vLLM gives no request more than this of a step if there are others, so that two prompts are computed side by side.
SHARED_CHUNK = 48
NEEDLE_BATCHES = (3, 8)


@dataclass(slots=True)
class Part:
    """What requests that ran together were answered, and how they were scheduled."""

    answers: dict[str, Answer] = field(default_factory=dict)
    steps: list[Scheduled] = field(default_factory=list)

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]

    @property
    def preempted(self) -> set[str]:
        """Requests that lost their blocks."""
        return {name for step in self.steps for name in step.preempted}


def _together(engine: Serving, requests: list[Request]) -> Part:
    """Run requests from an empty cache."""
    assert engine.flush()
    before = len(engine.steps)
    answers = engine.ask(*requests)
    return Part(answers, engine.steps[before:])


def _alone(engine: Serving, requests: list[Request]) -> dict[str, Answer]:
    """Run the same requests one by one, each from an empty cache."""
    return engine.ask_alone(*(Request(request.name, request.tokens, request.new_tokens) for request in requests))


# Two prompts with the same first 300 tokens, one that has 150 of them, and one that is nothing but their beginning.
SHARING = [
    Request("long", prompt(300, 1) + prompt(100, 2), 8),
    Request("other", prompt(300, 1) + prompt(40, 3), 8),
    Request("short", prompt(150, 1) + prompt(30, 4), 8),
    Request("inside", prompt(257, 1), 8),
]
# Two tiles for each to start with, and three in all.
GROWING = [Request(f"growing/{i}", prompt(240 + 3 * i, 20 + i), 40) for i in range(4)]
# A prompt whose chunks carry the decode row of a request that runs already.
MIXED = [Request("runs", prompt(100, 10), 40), Request("late", prompt(700, 11), 10, starts_after=("runs", 4))]
STRAWS = [Request(f"straw/{i}", prompt(20 + 37 * i, 30 + i), 12) for i in range(max(NEEDLE_BATCHES) - 1)]
NEEDLE = Request("needle", prompt(150, 12), 12)


@pytest.fixture(scope="module")
def parts(models: Models, patch: pytest.MonkeyPatch) -> dict[str, Part]:
    """Run everything that one engine with room enough is asked, and what a small pool is."""
    patch.setenv("KVARN_CANONICAL", "1")
    compute_row_by_row(patch)
    folder = models.path(QWEN3_GROUP_2)
    with serving(folder) as engine:
        parts = {"sharing": _together(engine, SHARING)}
        requests = [*SHARING, *GROWING, *MIXED, NEEDLE]
        parts["alone"] = Part(_alone(engine, requests))
    with serving(folder, max_num_batched_tokens=CHUNK) as engine:
        parts["mixed"] = _together(engine, MIXED)
        parts["mixed/hit"] = Part(engine.ask(*(Request(r.name, r.tokens, r.new_tokens) for r in MIXED)))
        for size in NEEDLE_BATCHES:
            straws = STRAWS[: size - 1]
            parts[f"needle/{size}"] = _together(engine, [*straws[::2], NEEDLE, *straws[1::2]])
    with serving(folder, long_prefill_token_threshold=SHARED_CHUNK) as engine:
        parts["side by side"] = _together(engine, SHARING)
    with serving(folder, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=CHUNK) as engine:
        parts["growing"] = _together(engine, GROWING)
    return parts


def test_request_hits_blocks_that_another_of_the_same_step_publishes(parts: dict[str, Part]) -> None:
    first = parts["sharing"].steps[0]
    assert first.prefix_lens == {"long": 0, "other": 2 * TILE, "short": TILE, "inside": 2 * TILE}
    assert parts["sharing"]["other"].cached_tokens == 2 * TILE
    for request in SHARING:
        same_bits(parts["sharing"][request.name], parts["alone"][request.name])


def test_requests_that_compute_a_shared_prefix_side_by_side_equal_themselves_alone(parts: dict[str, Part]) -> None:
    part = parts["side by side"]
    assert set(part.steps[0].prefix_lens.values()) == {0}
    assert all(part[request.name].cached_tokens == 0 for request in SHARING)
    for request in SHARING:
        same_bits(part[request.name], parts["alone"][request.name])


def test_chunk_ended_inside_a_tile_beside_a_decode_row(parts: dict[str, Part]) -> None:
    """What the next test rests on."""
    mixed = [step for step in parts["mixed"].steps if step.query_lens.get("runs") == 1 and "late" in step.query_lens]
    ends = [step.prefix_lens["late"] + step.query_lens["late"] for step in mixed]
    assert ends[:3] == [CHUNK - 1, 2 * CHUNK - 2, 700]


@pytest.mark.parametrize("name", ["runs", "late"])
def test_mixed_chunks_change_neither_answer_nor_what_they_leave_in_the_cache(parts: dict[str, Part], name: str) -> None:
    same_bits(parts["mixed"][name], parts["alone"][name])
    same_bits(parts["mixed/hit"][name], parts["alone"][name])
    assert parts["mixed/hit"]["late"].cached_tokens == 5 * TILE


@pytest.mark.parametrize("size", NEEDLE_BATCHES)
def test_request_in_a_batch_equals_the_request_alone(parts: dict[str, Part], size: int) -> None:
    assert any(len(step.query_lens) == size for step in parts[f"needle/{size}"].steps)
    same_bits(parts[f"needle/{size}"]["needle"], parts["alone"]["needle"])


def test_preempted_requests_equal_themselves_alone(parts: dict[str, Part]) -> None:
    part = parts["growing"]
    assert part.preempted, "the pool is too large for this test: nothing was preempted"
    for request in GROWING:
        same_bits(part[request.name], parts["alone"][request.name])
