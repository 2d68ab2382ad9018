"""Sizes: blocks of one and two tiles, presets, dtypes, deep models, and what vLLM makes of the bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import is_finite, same_bits
from engine_process import Models
from plan import Answer, Request
from row_by_row import compute_row_by_row
from serving import DTYPE, serving
from tiny_models import HEAD_DIM, KV_HEADS, LAYERS, LLAMA_GROUP_3, prompt

from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.presets import get_preset

BUDGET = 64 << 20
MAX_MODEL_LEN = 1024
# Large records and small rings: two layers' rings go into a block of one tile, four into a block of two.
DEEP_PRESET = "kvarn_k8v4_g128"
# The last of the blocks that hold a request's rings is filled in part, with either size of block.
DEEP_LAYERS = 11
SMALL_TILES = "kvarn_k4v4_g64"
KINDS = ("float16", "bfloat16, small tiles", "one tile", "two tiles", "deep, one tile", "deep, two tiles")
LENGTHS = (5, 257, 300, 400)
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine answered, and its memory.

    Args:
        answers: cold runs and hits, by their length and ``cold`` or ``hit``.
        shape: what KVarN plans with.
        block_size: tokens of a block.
        blocks: blocks of the pool.
        page_bytes: bytes of a block of records in all layers, as vLLM counts them.
        tail_blocks: blocks that one request's tail takes, as vLLM counts them.
        capacity: tokens and requests of full length that fit, as vLLM logs them.
        announced: the line that tells an operator what is being served.
    """

    answers: dict[tuple[int, str], Answer]
    shape: CacheShape
    block_size: int
    blocks: int
    page_bytes: int
    tail_blocks: int
    capacity: tuple[int, float]
    announced: str


@contextmanager
def _announcements() -> Iterator[list[str]]:
    """Collect what KVarN logs. Not by a handler: vLLM removes those when it sets its loggers up."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("vllm.kvarn"), "info", lambda text, *values: lines.append(text % values))
        yield lines


def _shape(preset: str, layers: int, dtype: str) -> CacheShape:
    raw_bytes = getattr(torch, dtype).itemsize
    return cache_shape(get_preset(preset), layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, raw_bytes=raw_bytes)


def _serve(model: Path, preset: str, layers: int, **options: Any) -> Served:
    """Ask each prompt twice, from a cache that was empty before the first."""
    with _announcements() as lines, serving(model, kv_cache_dtype=preset, **options) as engine:
        answers = {}
        for n in LENGTHS:
            assert engine.flush()
            for kind in ("cold", "hit"):
                answers[n, kind] = engine.ask(Request("it", prompt(n, seed=n), NEW_TOKENS))["it"]
        cache, groups = engine.config.cache_config, engine.scheduler.kv_cache_config.kv_cache_groups
        records, tail = (group.kv_cache_spec for group in groups)
        (announced,) = lines
        return Served(
            answers,
            _shape(preset, layers, options.get("dtype", "float32")),
            cache.block_size,
            cache.num_gpu_blocks,
            records.page_size_bytes * len(groups[0].layer_names),
            tail.max_memory_usage_bytes(engine.config) // tail.page_size_bytes,
            (cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency),
            announced,
        )


def _save_deep_model(models: Models) -> Path:
    """Save the tiny Llama with more layers."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(models.path(LLAMA_GROUP_3))
    config.num_hidden_layers = DEEP_LAYERS
    torch.manual_seed(0)
    folder = models.folder / "llama-deep"
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(models: Models) -> dict[str, Served]:
    """Run every kind of engine in canonical mode, so that a cold run and a hit are equal."""
    tiny, deep = models.path(LLAMA_GROUP_3), _save_deep_model(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARN_CANONICAL", "1")
        # Chunks of a tile, because what computes these dtypes is not split into rows.
        served = {
            "float16": _serve(tiny, DTYPE, LAYERS, dtype="float16", max_num_batched_tokens=128),
            "bfloat16, small tiles": _serve(tiny, SMALL_TILES, LAYERS, dtype="bfloat16", max_num_batched_tokens=128),
        }
        compute_row_by_row(patch)
        return served | {
            "one tile": _serve(tiny, DTYPE, LAYERS),
            "two tiles": _serve(tiny, DTYPE, LAYERS, block_size=256),
            "deep, one tile": _serve(deep, DEEP_PRESET, DEEP_LAYERS),
            "deep, two tiles": _serve(deep, DEEP_PRESET, DEEP_LAYERS, block_size=256),
        }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_engine_answers_hits_as_cold_runs(served: dict[str, Served], kind: str) -> None:
    engine = served[kind]
    for n in LENGTHS:
        cold, hit = engine.answers[n, "cold"], engine.answers[n, "hit"]
        assert is_finite(cold)
        assert len(cold.output_ids) == NEW_TOKENS
        assert cold.cached_tokens == 0
        assert hit.cached_tokens == (n - 1) // engine.block_size * engine.block_size
        same_bits(cold, hit)


@pytest.mark.parametrize(("kind", "rings"), [("", (1, 1)), ("deep, ", (2, 4))], ids=["tiny", "deep"])
def test_two_tiles_a_block_answer_as_one(served: dict[str, Served], kind: str, rings: tuple[int, int]) -> None:
    one, two = served[f"{kind}one tile"], served[f"{kind}two tiles"]
    assert (one.block_size, two.block_size) == (128, 256)
    assert (one.shape.rings_per_block(1), two.shape.rings_per_block(2)) == rings
    for n in LENGTHS:
        same_bits(one.answers[n, "cold"], two.answers[n, "cold"])
        same_bits(one.answers[n, "hit"], two.answers[n, "hit"])


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_counts_the_bytes_that_kvarn_plans(served: dict[str, Served], kind: str) -> None:
    engine = served[kind]
    tiles = engine.block_size // engine.shape.preset.tile_tokens
    assert engine.page_bytes == engine.shape.bytes_per_token * engine.block_size == engine.shape.page_bytes * tiles
    assert engine.tail_blocks == engine.shape.tail_blocks(tiles)
    assert f"{engine.shape.bytes_per_token} bytes a token" in engine.announced
    assert f"in {engine.tail_blocks} blocks of it" in engine.announced


@pytest.mark.parametrize("kind", KINDS)
def test_capacity_follows_from_the_budget(served: dict[str, Served], kind: str) -> None:
    engine = served[kind]
    tiles = engine.block_size // engine.shape.preset.tile_tokens
    ring_bytes = engine.shape.rings_per_block(tiles) * engine.shape.ring_bytes
    # Blocks of records and of rings come from one pool, so the larger kind sets the size.
    assert engine.blocks == BUDGET // max(engine.page_bytes, ring_bytes)
    requests = engine.blocks / (MAX_MODEL_LEN // engine.block_size + engine.tail_blocks)
    assert engine.capacity == (int(requests * MAX_MODEL_LEN), requests)


def test_small_tiles_share_the_block_that_vllm_likes(served: dict[str, Served]) -> None:
    engine = served["bfloat16, small tiles"]
    assert (engine.shape.preset.tile_tokens, engine.block_size) == (64, 128)


@pytest.mark.parametrize(
    ("kind", "blocks", "tail_blocks", "tokens"),
    [("one tile", 512, 2, 52_428), ("two tiles", 512, 2, 87_381), ("deep, one tile", 229, 6, 16_749)],
)
def test_sizes_are_these(served: dict[str, Served], kind: str, blocks: int, tail_blocks: int, tokens: int) -> None:
    engine = served[kind]
    assert (engine.blocks, engine.tail_blocks, engine.capacity[0]) == (blocks, tail_blocks, tokens)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("block_size", [128, 512])
def test_page_holds_its_rings_whatever_their_drafts(drafts: int, block_size: int) -> None:
    """A page is counted by bytes a token, of which rings with drafts may be no multiple."""
    from kvarn.vllm_backend.tails import TailCache

    preset = get_preset(DTYPE)
    shape = cache_shape(preset, layers=3, kv_heads=1, head_dim=64, raw_bytes=2, draft_tokens=drafts)
    tail = TailCache("tail", [], shape, torch.float16, 1, 512, torch.device("cpu"))
    spec = tail.get_kv_cache_spec(SimpleNamespace(cache_config=SimpleNamespace(block_size=block_size)))
    tiles = block_size // preset.tile_tokens
    rings = shape.rings_per_block(tiles) * shape.ring_bytes
    assert rings <= spec.page_size_bytes < rings + block_size
