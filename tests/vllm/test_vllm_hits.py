"""Canonical mode: what comes from vLLM's prefix cache equals what is computed, to the last bit.

Rows are computed one by one (row_by_row.py), so that chunks may be cut anywhere; once vLLM also runs as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from compare import same_bits
from engine_process import Models
from plan import Answer, Request
from row_by_row import compute_row_by_row
from serving import Serving, serving
from tiny_models import LLAMA_GROUP_3, MODELS, prompt

TILE = 128
LENGTHS = (1, 5, 127, 128, 129, 255, 256, 257, 300, 513)
REPEATS = 4
NEW_TOKENS = 6
# No divisor of a tile, so that chunks end anywhere in it; a prompt of 145 tokens ends in a chunk of one.
SHORT_CHUNK = 48
CHUNKED_LENGTHS = (5, 128, 145, 300, 385, 513)


@dataclass(frozen=True, slots=True)
class Run:
    """What one model answered, by name, and the lengths of the short chunks of each prompt."""

    answers: dict[str, Answer]
    chunks: dict[str, list[int]]

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


def _repeat(engine: Serving) -> dict[str, Answer]:
    """Ask each prompt several times, from a cache that was empty before the first."""
    answers: dict[str, Answer] = {}
    for n in LENGTHS:
        assert engine.flush()
        for i in range(REPEATS):
            answers |= engine.ask(Request(f"{n}/{i}", prompt(n, seed=n), NEW_TOKENS))
    return answers


def _turns(engine: Serving) -> dict[str, Answer]:
    """Ask three turns of a conversation over one cache, then each again from an empty one.

    The tiles that turns 2 and 3 hit are partly prefilled and partly decoded.
    """
    assert engine.flush()
    history, requests, answers = [], [], {}
    for i, (appended, new_tokens) in enumerate(((200, 80), (60, 130), (90, 12)), start=1):
        history = history + prompt(appended, seed=900 + i)
        requests.append(Request(f"turn/{i}", history, new_tokens))
        answers |= engine.ask(requests[-1])
        history = history + answers[f"turn/{i}"].output_ids
    cold = [Request(f"cold/{request.name}", request.tokens, request.new_tokens) for request in requests]
    return answers | engine.ask_alone(*cold)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def run(request: pytest.FixtureRequest, models: Models) -> Run:
    """Ask one model everything, in one chunk and in short ones."""
    folder = models.path(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARN_CANONICAL", "1")
        compute_row_by_row(patch)
        with serving(folder) as engine:
            answers = _repeat(engine) | _turns(engine)
        with serving(folder, max_num_batched_tokens=SHORT_CHUNK) as engine:
            requests = [Request(f"chunked/{n}", prompt(n, seed=n), NEW_TOKENS) for n in CHUNKED_LENGTHS]
            # A hit on tiles that were sealed from several chunks.
            again = [Request(f"chunked/{n}/hit", prompt(n, seed=n), NEW_TOKENS) for n in CHUNKED_LENGTHS]
            for first, second in zip(requests, again, strict=True):
                assert engine.flush()
                answers |= engine.ask(first) | engine.ask(second)
            chunks = {
                name: [step.query_lens[name] for step in engine.steps if name in step.query_lens]
                for name in (request.name for request in requests)
            }
    return Run(answers, chunks)


@pytest.fixture(scope="module")
def stock(models: Models, patch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """Ask vLLM as it is. In chunks of a tile the model runs on as many rows after a hit as it did without one."""
    patch.setenv("KVARN_CANONICAL", "1")
    with serving(models.path(LLAMA_GROUP_3), max_num_batched_tokens=TILE) as engine:
        return _repeat(engine)


def _assert_equal(answers: Mapping[str, Answer], n: int) -> None:
    cold, *hits = (answers[f"{n}/{i}"] for i in range(REPEATS))
    assert cold.cached_tokens == 0
    assert len(cold.output_ids) == NEW_TOKENS
    for hit in hits:
        assert hit.cached_tokens == (n - 1) // TILE * TILE
        same_bits(cold, hit)


@pytest.mark.parametrize("n", LENGTHS)
def test_every_hit_equals_the_cold_run(run: Run, n: int) -> None:
    _assert_equal(run.answers, n)


@pytest.mark.parametrize("n", LENGTHS)
def test_every_hit_equals_the_cold_run_without_instruments(stock: dict[str, Answer], n: int) -> None:
    _assert_equal(stock, n)


@pytest.mark.parametrize(("turn", "cached"), [(2, 2 * TILE), (3, 3 * TILE)])
def test_turn_equals_a_cold_run_of_the_whole_conversation(run: Run, turn: int, cached: int) -> None:
    assert run[f"turn/{turn}"].cached_tokens == cached
    assert run[f"cold/turn/{turn}"].cached_tokens == 0
    same_bits(run[f"turn/{turn}"], run[f"cold/turn/{turn}"])


@pytest.mark.parametrize("n", [n for n in CHUNKED_LENGTHS if n in LENGTHS])
def test_short_chunks_equal_one_big_chunk(run: Run, n: int) -> None:
    same_bits(run[f"chunked/{n}"], run[f"{n}/0"])


@pytest.mark.parametrize("n", CHUNKED_LENGTHS)
def test_hit_on_tiles_of_short_chunks_equals_the_run_that_sealed_them(run: Run, n: int) -> None:
    assert run[f"chunked/{n}/hit"].cached_tokens == (n - 1) // TILE * TILE
    same_bits(run[f"chunked/{n}/hit"], run[f"chunked/{n}"])


def test_chunks_ended_inside_tiles(run: Run) -> None:
    """What the two tests before rest on."""
    for n in CHUNKED_LENGTHS:
        full, rest = divmod(n, SHORT_CHUNK)
        decoded = [1] * (NEW_TOKENS - 1)
        assert run.chunks[f"chunked/{n}"] == [SHORT_CHUNK] * full + [rest] * bool(rest) + decoded
