"""core.capacity: what is planned fits, is all that fits, and is to the byte what gets allocated."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.cache import CacheConfig, allocate_layer, layer_bytes
from kvarn.core.capacity import CacheShape, exact_tokens, plan_capacity, ring_tokens
from kvarn.core.layout import HEAD_DIMS
from kvarn.errors import CapacityError, KVarNError
from kvarn.presets import PRESETS, get_preset

GIB = 1 << 30
K4V2 = get_preset("kvarn_k4v2_g128")
QWEN3_8B = CacheShape(K4V2, layers=36, kv_heads=8, head_dim=128, raw_bytes=2, tail_tokens=128, sink_tokens=4)

SHAPES = st.builds(
    CacheShape,
    preset=st.sampled_from(list(PRESETS.values())),
    layers=st.integers(1, 100),
    kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from(HEAD_DIMS),
    raw_bytes=st.sampled_from([2, 4]),
    tail_tokens=st.integers(0, 1024),
    sink_tokens=st.integers(0, 64),
    draft_tokens=st.integers(0, 16),
)
BUDGETS = st.integers(0, 200 * GIB)
REQUESTS = st.integers(1, 5000)
repeatable = settings(derandomize=True, database=None, deadline=None)


@st.composite
def fits(draw: st.DrawFn) -> tuple[CacheShape, int, int]:
    """A shape, a number of requests and a budget that holds them and a page or more."""
    shape, requests = draw(SHAPES), draw(REQUESTS)
    return shape, requests, shape.fixed_bytes(requests) + 2 * shape.page_bytes + draw(BUDGETS)


def raw_dtype(shape: CacheShape) -> torch.dtype:
    return torch.bfloat16 if shape.raw_bytes == 2 else torch.float32


def allocated_bytes(shape: CacheShape, pages: int, rows: int, slots: int) -> int:
    """Bytes that the real allocation takes, without taking them."""
    config = CacheConfig(shape.layout, shape.kv_heads, shape.tail_tokens, shape.sink_tokens, shape.ring_tokens)
    layer = allocate_layer(config, pages, rows, slots, raw_dtype(shape), "meta")
    total = layer.records.nbytes + layer.tails.nbytes + layer.sinks.nbytes
    assert sum(layer_bytes(layer)) == total
    return shape.layers * total


@repeatable
@given(SHAPES, BUDGETS, REQUESTS)
def test_plan_fits_and_no_further_page_would(shape: CacheShape, budget: int, requests: int) -> None:
    try:
        plan = plan_capacity(shape, budget, requests)
    except CapacityError:
        assert shape.fixed_bytes(requests) + 2 * shape.page_bytes > budget
        return
    used = plan.token_bytes + plan.fixed_bytes
    assert used <= budget < used + shape.page_bytes
    assert plan.max_requests == requests
    assert plan.tokens > 0
    assert plan.tokens % shape.preset.tile_tokens == 0


@repeatable
@given(fits(), st.booleans())
def test_plan_is_what_gets_allocated_to_the_byte(case: tuple[CacheShape, int, int], by_default: bool) -> None:
    shape, requests, budget = case
    plan = plan_capacity(shape, 10 * budget, None) if by_default else plan_capacity(shape, budget, requests)
    pages = plan.tokens // shape.preset.tile_tokens + 1  # the engine's padding page
    slots = shape.sink_slots(plan.max_requests)
    wanted = allocated_bytes(shape, pages, plan.max_requests + 1, slots)  # one spare row for padding
    assert plan.token_bytes + plan.fixed_bytes == wanted


@pytest.mark.parametrize(
    "shape",
    [
        CacheShape(K4V2, 2, 2, 64, 2, 128, 4),
        CacheShape(get_preset("kvarn_k3v3_g128"), 3, 1, 96, 4, 0, 0),
        CacheShape(get_preset("kvarn_k4v4_g64"), 1, 3, 192, 2, 37, 16, draft_tokens=5),
    ],
    ids=["k4v2", "k3v3-float32-no-tail", "k4v4-drafts"],
)
def test_plan_is_what_real_tensors_take(shape: CacheShape) -> None:
    plan = plan_capacity(shape, 8 << 20, 3)
    config = CacheConfig(shape.layout, shape.kv_heads, shape.tail_tokens, shape.sink_tokens, shape.ring_tokens)
    pages = plan.tokens // shape.preset.tile_tokens + 1
    layers = [
        allocate_layer(
            config, pages, plan.max_requests + 1, shape.sink_slots(plan.max_requests), raw_dtype(shape), "cpu"
        )
        for _ in range(shape.layers)
    ]
    tensors = [x for layer in layers for x in (layer.records, layer.tails, layer.sinks)]
    assert sum(x.untyped_storage().nbytes() for x in tensors) == plan.token_bytes + plan.fixed_bytes
    assert not any(x.any() for x in tensors)


@repeatable
@given(fits(), st.integers(0, GIB))
def test_more_memory_never_holds_fewer_tokens(case: tuple[CacheShape, int, int], more: int) -> None:
    shape, requests, budget = case
    before = plan_capacity(shape, budget, requests)
    after = plan_capacity(shape, budget + more, requests)
    assert after.tokens >= before.tokens
    assert after.tokens - before.tokens <= (more // shape.page_bytes + 1) * shape.preset.tile_tokens
    assert shape.default_max_requests(budget + more) >= shape.default_max_requests(budget)


@repeatable
@given(fits(), REQUESTS)
def test_more_requests_never_leave_more_tokens(case: tuple[CacheShape, int, int], fewer: int) -> None:
    shape, requests, budget = case
    fewer = min(fewer, requests)
    assert plan_capacity(shape, budget, fewer).tokens >= plan_capacity(shape, budget, requests).tokens
    assert fewer == requests or shape.fixed_bytes(requests) > shape.fixed_bytes(fewer)


@repeatable
@given(SHAPES, BUDGETS)
def test_default_limit_spends_a_tenth_of_the_budget_on_tails(shape: CacheShape, budget: int) -> None:
    requests = shape.default_max_requests(budget)
    one = shape.tail_bytes_per_request + 8 * shape.sink_bytes_per_slot
    assert requests == 1 or requests * one <= budget // 10
    assert requests == 4096 or (requests + 1) * one > budget // 10


@repeatable
@given(SHAPES)
def test_break_even_is_the_first_length_that_saves(shape: CacheShape) -> None:
    tokens = shape.break_even_tokens

    def saved(count: int) -> int:
        return count * shape.raw_bytes_per_token - shape.tail_bytes_per_request - count * shape.bytes_per_token

    assert saved(tokens) >= 0 > saved(tokens - 1)


@repeatable
@given(SHAPES, st.integers(1, 64))
def test_bytes_grow_in_proportion_to_layers_and_heads(shape: CacheShape, times: int) -> None:
    for more in (replace(shape, layers=times * shape.layers), replace(shape, kv_heads=times * shape.kv_heads)):
        assert more.page_bytes == times * shape.page_bytes
        assert more.fixed_bytes(9) == times * shape.fixed_bytes(9)
        assert more.raw_bytes_per_token == times * shape.raw_bytes_per_token


@repeatable
@given(SHAPES)
def test_ring_holds_tile_tail_and_drafts(shape: CacheShape) -> None:
    assert shape.ring_tokens == shape.preset.tile_tokens + shape.tail_tokens + shape.draft_tokens
    assert shape.ring_tokens == ring_tokens(shape.preset, shape.tail_tokens, shape.draft_tokens)


def test_without_sinks_no_slot_is_kept() -> None:
    shape = replace(QWEN3_8B, sink_tokens=0)
    assert shape.sink_slots(64) == 0
    assert shape.fixed_bytes(64) == 65 * shape.tail_bytes_per_request


def test_qwen3_8b_costs_what_the_design_says() -> None:
    assert QWEN3_8B.page_bytes == 13_824 * 8 * 36
    assert QWEN3_8B.bytes_per_token == 31_104
    assert QWEN3_8B.raw_bytes_per_token == 147_456
    assert QWEN3_8B.tail_bytes_per_request == 37_748_736  # 37.7 MB
    assert -(-QWEN3_8B.tail_bytes_per_request // QWEN3_8B.bytes_per_token) == 1_214
    assert round(64 * QWEN3_8B.tail_bytes_per_request / 1e9, 1) == 2.4
    assert round(256 * QWEN3_8B.tail_bytes_per_request / 1e9, 1) == 9.7
    assert QWEN3_8B.break_even_tokens == 325


def test_ratio_tends_to_the_records_own() -> None:
    lean = replace(QWEN3_8B, tail_tokens=0, sink_tokens=0)
    assert plan_capacity(lean, 100 * GIB, 1).ratio == pytest.approx(512 / 108, rel=1e-3)
    charged = plan_capacity(QWEN3_8B, 100 * GIB)
    assert 0.89 * 512 / 108 < charged.ratio < 0.91 * 512 / 108


@pytest.mark.parametrize("budget", [0, 1, QWEN3_8B.page_bytes, QWEN3_8B.fixed_bytes(8) + 2 * QWEN3_8B.page_bytes - 1])
def test_too_small_a_budget_is_refused_with_numbers_and_a_remedy(budget: int) -> None:
    with pytest.raises(CapacityError) as caught:
        plan_capacity(QWEN3_8B, budget, 8)
    message = str(caught.value)
    assert all(str(n) in message for n in (budget, QWEN3_8B.page_bytes, QWEN3_8B.fixed_bytes(8)))
    assert "Lower the request limit or give the cache more memory." in message
    assert isinstance(caught.value, KVarNError)


def test_smallest_budget_that_is_not_refused_holds_one_page() -> None:
    plan = plan_capacity(QWEN3_8B, QWEN3_8B.fixed_bytes(8) + 2 * QWEN3_8B.page_bytes, 8)
    assert plan.tokens == K4V2.tile_tokens


def test_environment_changes_what_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_tokens(K4V2) == (128, 4)
    monkeypatch.setenv("KVARN_TAIL_TOKENS", "256")
    assert exact_tokens(K4V2) == (256, 4)
    monkeypatch.setenv("KVARN_CANONICAL", "1")
    assert exact_tokens(K4V2) == (0, 0)


@given(SHAPES, st.integers(1, 8))
@repeatable
def test_tail_blocks_hold_the_ring_of_every_layer(shape: CacheShape, tiles_per_block: int) -> None:
    rings, blocks = shape.rings_per_block(tiles_per_block), shape.tail_blocks(tiles_per_block)
    assert shape.ring_bytes * shape.layers == shape.tail_bytes_per_request
    assert (blocks - 1) * rings < shape.layers <= blocks * rings
    assert rings == 1 or rings * shape.ring_bytes <= tiles_per_block * shape.page_bytes


def test_tail_blocks_of_a_real_model() -> None:
    assert (QWEN3_8B.rings_per_block(1), QWEN3_8B.tail_blocks(1)) == (3, 12)
    assert (QWEN3_8B.rings_per_block(4), QWEN3_8B.tail_blocks(4)) == (15, 3)
