"""Layers with a window in an engine's blocks: a request takes few bytes, and records no more than without windows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.capacity import CacheShape, plan_blocks
from kvarn.core.windows import WindowShape
from kvarn.presets import get_preset

K4V2 = get_preset("kvarn_k4v2_g128")
GIB = 1 << 30
# Model, layers in tiles, layers with a window, its tokens, kv heads, head_dim.
GEMMA_3 = {
    "270m": (3, 15, 512, 1, 256),
    "1b": (4, 22, 512, 1, 256),
    "4b": (5, 29, 1024, 4, 256),
    "12b": (8, 40, 1024, 8, 256),
    "27b": (10, 52, 1024, 16, 128),
}
WINDOWS = st.builds(
    WindowShape,
    layers=st.integers(1, 64),
    tokens=st.sampled_from([128, 500, 512, 1024, 4096]),
    kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 128, 256]),
    raw_bytes=st.sampled_from([2, 4]),
)


def gemma(name: str) -> CacheShape:
    layers, with_window, window, heads, head_dim = GEMMA_3[name]
    windows = WindowShape(with_window, window, heads, head_dim, 2)
    return CacheShape(K4V2, layers, heads, head_dim, 2, tail_tokens=128, sink_tokens=4, windows=windows)


@settings(derandomize=True, database=None, deadline=None)
@given(WINDOWS, st.integers(1 << 14, 1 << 22), st.integers(1, 8))
def test_blocks_hold_the_window_of_every_layer_and_pages_end_where_tiles_do(windows, block_bytes, tiles):
    tokens = windows.page_tokens(block_bytes, tiles * 128)
    assert tiles * 128 % tokens == 0
    fits = tokens * windows.token_bytes <= block_bytes
    assert fits or tokens == min(windows.pages)
    pages = -(-windows.tokens // tokens) + 1
    assert pages * tokens >= windows.tokens + tokens
    layers_per_block = max(1, block_bytes // (tokens * windows.token_bytes))
    assert windows.blocks_per_request(block_bytes, tokens) * layers_per_block >= windows.layers * pages


@pytest.mark.parametrize("context", [4096, 32768, 131072])
@pytest.mark.parametrize("name", GEMMA_3)
def test_a_block_is_no_smaller_than_a_ring_and_larger_only_if_that_takes_fewer_bytes(name, context):
    shape = gemma(name)
    tiles = shape.best_tiles_per_block(context)
    assert shape.block_bytes(tiles) >= shape.ring_bytes
    taken = [shape.request_blocks(context, t) * shape.block_bytes(t) for t in range(1, 9)]
    assert taken[tiles - 1] <= 1.1 * min(taken)
    assert all(smaller > 1.1 * min(taken) for smaller in taken[: tiles - 1])


@pytest.mark.parametrize("name", GEMMA_3)
def test_rings_of_few_layers_do_not_triple_what_records_take(name):
    """At 128k tokens records are most of a request, whatever rings and windows need."""
    shape, context = gemma(name), 131072
    requests = plan_blocks(shape, 64 * GIB, context, shape.best_tiles_per_block(context))
    ideal = context * shape.bytes_per_token + shape.tail_bytes_per_request + shape.window_bytes
    assert 64 * GIB / requests < 1.15 * ideal


def test_a_page_is_one_that_the_attention_takes():
    windows = WindowShape(15, 512, 1, 256, 2, pages=(64, 128))
    assert windows.page_tokens(81_408, 128) == 64
    assert windows.page_tokens(20_000, 128) == 64  # larger than a block: then the smallest
