"""A storm of aborts over a small pool: who survives is answered as if alone, and nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from compare import is_finite
from engine_process import Models
from plan import Answer, Request
from row_by_row import compute_row_by_row
from serving import Serving, serving
from tiny_models import LLAMA_GROUP_3, prompt
from vllm_storm import ABORTED, FAMILIES, LENGTHS, NEW_TOKENS, REQUESTS, Ended, make_storm, weather

# With the null block that vLLM keeps; a request of these takes two for its tail.
BLOCKS = 13
CHUNK = 64
SEED = 2
MODES = ("canonical", "default")


@dataclass(frozen=True, slots=True)
class Left:
    """What a storm left behind.

    Args:
        ended: what its requests were answered.
        alone: what each prompt was answered by itself, in canonical mode.
        free: blocks that no request held before and after.
        holders: requests that a block manager, or the scheduler itself, still knows afterwards.
        flushed: whether the prefix cache could be emptied afterwards.
    """

    ended: Ended
    alone: list[Answer]
    free: tuple[int, int]
    holders: set[str]
    flushed: bool


def _holders(engine: Serving) -> set[str]:
    scheduler = engine.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = {rid for manager in managers for rid, blocks in manager.req_to_blocks.items() if blocks}
    return held | set(scheduler.requests)


@pytest.fixture(scope="module")
def storms(models: Models) -> dict[str, Left]:
    """Run a storm in each mode. After every step sink slots and open tiles are audited; default mode has such slots."""
    prompts = [prompt(n, family) for n in LENGTHS for family in FAMILIES]
    left = {}
    for mode, canonical in (("canonical", "1"), ("default", "0")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVARN_CANONICAL", canonical)
            if mode == "canonical":
                compute_row_by_row(patch)
            options = {"num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": CHUNK}
            with serving(models.path(LLAMA_GROUP_3), **options) as engine:
                before = engine.free_blocks
                references = [Request(f"alone/{i}", tokens, NEW_TOKENS) for i, tokens in enumerate(prompts)]
                alone = engine.ask_alone(*references) if mode == "canonical" else {}
                ended = weather(engine, make_storm(SEED))
                free = (before, engine.free_blocks)
                left[mode] = Left(ended, list(alone.values()), free, _holders(engine), engine.flush())
    return left


@pytest.mark.parametrize("mode", MODES)
def test_aborts_hit_the_queue_chunks_decoding_and_preempted_requests(storms: dict[str, Left], mode: str) -> None:
    """What the other tests rest on."""
    ended = storms[mode].ended
    computed = [(ended.computed[name], len(answer.prompt)) for name, answer in ended.aborted.items()]
    assert len(computed) == ABORTED
    assert any(tokens == 0 for tokens, _ in computed)
    assert any(0 < tokens < length for tokens, length in computed)
    assert any(tokens > length for tokens, length in computed)
    assert ended.preempted.intersection(ended.aborted)
    assert ended.preempted.difference(ended.aborted)


@pytest.mark.parametrize("mode", MODES)
def test_survivors_get_every_token_they_asked_for(storms: dict[str, Left], mode: str) -> None:
    ended = storms[mode].ended
    assert len(ended.survivors) == REQUESTS - ABORTED
    assert all(is_finite(answer) for answer in ended.survivors)
    assert [len(answer.output_ids) for answer in ended.survivors] == [
        request.new_tokens for request in make_storm(SEED).requests if request.name not in ended.aborted
    ]


def test_survivors_equal_themselves_alone_in_canonical_mode(storms: dict[str, Left]) -> None:
    """In default mode a hit reads records where a request alone reads exact rows."""
    alone = {tuple(answer.prompt): answer for answer in storms["canonical"].alone}
    for answer in storms["canonical"].ended.survivors:
        tokens, reference = len(answer.output_ids), alone[tuple(answer.prompt)]
        assert answer.bits == (reference.output_ids[:tokens], reference.logprobs[:tokens])


@pytest.mark.parametrize("mode", MODES)
def test_no_block_is_held_after_the_storm(storms: dict[str, Left], mode: str) -> None:
    left = storms[mode]
    assert left.free == (BLOCKS - 1, BLOCKS - 1)
    assert left.holders == set()
    assert left.flushed
