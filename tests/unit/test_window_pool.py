"""core.window_pool: windows beside tiles take the bytes that they take beside a cache of the model's dtype."""

from dataclasses import replace

import pytest

from kvarn.core.capacity import CacheShape, plan_capacity
from kvarn.core.window_pool import WindowPool, scaled_ratio
from kvarn.core.windows import WindowShape
from kvarn.presets import PRESETS

GIB = 1 << 30
# Gemma-3-27B's, whose other 10 layers attend to all tokens.
WINDOWS = WindowShape(52, tokens=1024, kv_heads=16, head_dim=128, raw_bytes=2)


def shape_of(preset):
    return CacheShape(preset, 10, 16, 128, 2, preset.tail_tokens, preset.sink_tokens)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("ratio", [0.1, 0.8])
def test_scaled_ratio_leaves_windows_their_tokens_and_gives_the_rest_to_tiles(preset, ratio):
    shape = shape_of(preset)
    raw_tokens = 40 * GIB / (shape.raw_bytes_per_token + ratio * 52 * 16 * 512)
    pool = WindowPool(shape, WINDOWS, scaled_ratio(shape, ratio))
    tokens = 40 * GIB / pool.bytes_of_both
    assert pool.ratio * tokens == pytest.approx(ratio * raw_tokens)
    assert tokens / raw_tokens == pytest.approx(shape.raw_bytes_per_token / shape.bytes_per_token)


def test_most_requests_fit_with_their_window_and_three_pages():
    shape = shape_of(PRESETS["kvarn_k4v2_g128"])
    pool = WindowPool(shape, WINDOWS, 0.2)
    tokens = 0.2 * 40 * GIB / pool.bytes_of_both
    assert pool.most_requests(40 * GIB) == tokens // (1024 + 3 * 128)


def test_what_a_draft_model_caches_is_taken_from_all_pools():
    shape = shape_of(PRESETS["kvarn_k4v2_g128"])
    budget, draft_bytes = 40 * GIB, 512
    plan = plan_capacity(shape, budget, 4, draft_bytes)
    pool = WindowPool(shape, WINDOWS, 0.2, draft_bytes)
    tokens = pool.tokens(plan)
    taken = tokens * (shape.bytes_per_token + draft_bytes) + int(0.2 * tokens) * pool.bytes_per_token
    padding = 128 * (shape.bytes_per_token + draft_bytes + pool.bytes_per_token)
    assert 0 <= budget - shape.fixed_bytes(4) - padding - taken < 2 * 128 * pool.bytes_of_both


def test_one_request_is_served_however_little_there_is():
    pool = WindowPool(shape_of(PRESETS["kvarn_k4v2_g128"]), replace(WINDOWS, tokens=1 << 20), 0.2)
    assert pool.most_requests(GIB) == 1


def test_padding_page_is_one_tile_of_tokens():
    assert WindowPool(shape_of(PRESETS["kvarn_k4v2_g64"]), WINDOWS, 0.5).page_bytes == 64 * 52 * 16 * 512


def test_too_small_a_plan_has_no_tokens():
    pool = WindowPool(shape_of(PRESETS["kvarn_k4v2_g128"]), WINDOWS, 0.2)
    assert pool.tokens(plan_capacity(pool.shape, pool.shape.fixed_bytes(1) + 2 * pool.shape.page_bytes, 1)) == 0
