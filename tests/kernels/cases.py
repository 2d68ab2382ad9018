"""Ragged batches over a small cache, brought to life by the torch references, for kernels to be compared on."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvarn.core.append import RotatedRows, rotate_rows_reference, store_tail_reference
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.chunk_step import chunk_step
from kvarn.core.explicit import VERIFY_COLUMNS
from kvarn.core.flash import flash_for
from kvarn.core.layout import TileLayout
from kvarn.core.prefill_plan import PrefillPlan, plan_prefill
from kvarn.core.seal import seal_reference
from kvarn.core.step import Step, verify_step
from kvarn.core.tail import TailState, owner_tags
from kvarn.core.work import Tasks, count_work_reference
from kvarn.presets import get_preset

NAN = float("nan")


@dataclass
class Case:
    """A layer's cache in mid-life and the next step over it, its rows rotated but not stored."""

    layer: LayerCache
    state: TailState
    step: Step
    rotated: RotatedRows
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def poisoned_layer(
    config: CacheConfig[Any], blocks: int, rows: int, slots: int, dtype: torch.dtype, device: str, pad: int
) -> LayerCache[Any]:
    """Allocate a cache full of NaN, with padding between records, tiles, heads and ring rows of requests."""
    layout, heads, tiles = config.layout, config.kv_heads, config.tiles_per_block
    parts, width = layout.raw_shape
    shape = (blocks, tiles + pad, heads + pad, layout.record_bytes + 128 * pad)
    records = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    tails = torch.full((rows, parts, heads + pad, config.ring_tokens, width), NAN, dtype=dtype, device=device)
    sinks = torch.full((slots, parts, heads + pad, config.sink_tokens, width), NAN, dtype=dtype, device=device)
    return LayerCache(
        config, records[:, :tiles, :heads, : layout.record_bytes], tails[:, :, :heads], sinks[:, :, :heads]
    )


def make_case(
    lengths: list[int],
    new: list[int],
    *,
    preset: str = "kvarn_k4v2_g128",
    head_dim: int = 64,
    kv_heads: int = 2,
    group: int = 4,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    tail: int = 128,
    sink: int = 4,
    hits: list[int] | None = None,
    canonical: bool = False,
    pad: int = 1,
    seed: int = 0,
    slots: int = 2,
    outliers: bool = False,
    tiles_per_block: int = 1,
    batch_invariant: bool = False,
    planned: bool = False,
    drafts: int = 0,
    widest: int = VERIFY_COLUMNS,
    magnitude: float = 1.0,
) -> Case:
    """Grow requests to `lengths` (one chunk each, after `hits` tokens of prefix hit), then make a step of `new` rows.

    A step of one row for everybody is a decode step, one of as many rows, `drafts` or fewer of them drafts, is a verify
    step, any other is a chunk. With fewer slots than requests, some requests have no exact sinks. `planned`: long
    chunks of the step attend by flash attention. `widest`: the most query columns of a program. `magnitude`: of keys
    and values; queries are as much larger.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = TileLayout.of(get_preset(preset), head_dim)
    ring = layout.tile_tokens + tail + drafts
    config = CacheConfig(layout, kv_heads, tail, sink, ring, canonical, batch_invariant, tiles_per_block, drafts)
    hits = hits or [0] * len(lengths)
    pages_each = [-(-(a + b) // layout.tile_tokens) for a, b in zip(lengths, new, strict=True)]
    blocks = 1 + -(-sum(pages_each) // tiles_per_block)
    table = shuffled_table(pages_each, generator) + tiles_per_block - 1
    layer = poisoned_layer(config, blocks, len(lengths) + 2, slots, dtype, "cpu", pad)
    state = TailState(config, len(lengths) + 2, blocks, slots, "cpu")

    rows = functools.partial(_random_rows, head_dim, kv_heads if outliers else 0, dtype, generator)
    request_rows = torch.arange(1, len(lengths) + 1, dtype=torch.int32).flip(0)
    tags = owner_tags([f"request-{i}" for i in range(len(lengths))])
    for begin, end, names in (([0] * len(hits), hits, tags.flip(0)), (hits, lengths, tags)):
        if begin == end:
            continue
        count = sum(end) - sum(begin)
        past, _ = chunk_step(state, request_rows, ints(begin), ints(end), names, table, group, count)
        rotated = rotate_rows_reference(rows(count, kv_heads) * magnitude, rows(count, kv_heads) * magnitude)
        seal_reference(rotated, layer, past)
        store_tail_reference(rotated, layer, past)
    plan = _plan(config, dtype, lengths, new, "cpu") if planned else None
    step = next_step(state, request_rows, lengths, new, tags, table, group, plan, widest)
    assert int(state.faults) == 0
    q, k, v = (rows(sum(new), heads) for heads in (kv_heads * group, kv_heads, kv_heads))
    q, k, v = q / magnitude, k * magnitude, v * magnitude
    return to_device(Case(layer, state, step, rotate_rows_reference(k, v), q, k, v), device)


def next_step(
    state: TailState, rows: torch.Tensor, lengths: list[int], new: list[int], tags: torch.Tensor, table: torch.Tensor,
    group: int, plan: PrefillPlan | None = None, widest: int = VERIFY_COLUMNS,
) -> Step:  # fmt: skip
    """Describe a step of new rows: a verify step if every request has as many and no more than drafts, else a chunk."""
    ends = [a + b for a, b in zip(lengths, new, strict=True)]
    if len(set(new)) == 1 and new[0] <= state.config.draft_tokens + 1:
        return verify_step(state, rows, ints(ends), table, group, new[0], widest)
    return chunk_step(state, rows, ints(lengths), ints(ends), tags, table, group, sum(new), plan, widest)[0]


def _plan(
    config: CacheConfig, dtype: torch.dtype, prefix_lens: list[int], query_lens: list[int], device: str
) -> PrefillPlan | None:
    where = torch.device(device)
    return plan_prefill(
        config, flash_for(config, dtype, where, caps_logits=False), dtype, prefix_lens, query_lens, where
    )


def _random_rows(
    head_dim: int, outlier_heads: int, dtype: torch.dtype, generator: torch.Generator, count: int, heads: int
) -> torch.Tensor:
    x = torch.randn(count, heads, head_dim, generator=generator)
    if heads == outlier_heads:
        x[..., :3] += torch.tensor([300.0, -80.0, 40.0])
    return x.to(dtype)


def shuffled_table(pages_each: list[int], generator: torch.Generator) -> torch.Tensor:
    """Give every request pages in random order; entries past its end point at a live page, as stale entries do."""
    order = (torch.randperm(sum(pages_each), generator=generator) + 1).to(torch.int32)
    table = torch.full((len(pages_each), max(pages_each) + 1), sum(pages_each), dtype=torch.int32)
    for row, pages in zip(table, order.split(pages_each), strict=True):
        row[: len(pages)] = pages
    return table


def store_and_seal(case: Case) -> None:
    """Do by the references what comes before attention in a step."""
    if case.step.rows_in_ring:
        store_tail_reference(case.rotated, case.layer, case.step)
    seal_reference(case.rotated, case.layer, case.step)


def without_others(case: Case, requests: int) -> Case:
    """Keep the first requests of a case, as a step of their own over the same cache."""
    step, config = case.step, case.layer.config
    tokens = int(step.query_start[requests])
    tasks = int((-(-step.query_start.diff()[:requests] // step.rows_per_task)).sum())
    per_request = ("rows", "block_table", "prefix_lens", "seq_lens", "own_start", "sink_slots")
    kept = {name: getattr(step, name)[:requests] for name in per_request}
    kept |= {name: getattr(step, name)[:tokens] for name in ("token_request", "token_position")}
    kept |= {name: getattr(step, name)[:tasks] for name in ("task_request", "task_row")}
    part = replace(step, query_start=step.query_start[: requests + 1], **kept)
    work_end = count_work_reference(config, Tasks(*(getattr(part, name) for name in Tasks._fields)))
    rows = {name: getattr(case, name)[:tokens] for name in ("q", "k", "v")}
    rotated = RotatedRows(case.rotated.k[:tokens], case.rotated.v[:tokens])
    return replace(case, step=replace(part, work_end=work_end), rotated=rotated, **rows)


def to_device(case: Case, device: str) -> Case:
    """Copy a case to another device, strides kept."""

    def move(x: object) -> object:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    layer = layer_to(case.layer, device)
    step = Step(**{name: move(getattr(case.step, name)) for name in Step.__dataclass_fields__})
    if step.plan is not None:
        lens = (case.step.prefix_lens.tolist(), case.step.query_start.diff().tolist())
        step = replace(step, plan=_plan(case.layer.config, case.q.dtype, *lens, device))
    rotated = RotatedRows(*(x.to(device) for x in (case.rotated.k, case.rotated.v)))
    return Case(layer, case.state, step, rotated, case.q.to(device), case.k.to(device), case.v.to(device))


def layer_to(layer: LayerCache[Any], device: str) -> LayerCache[Any]:
    """Copy a cache to another device, strides kept."""
    return LayerCache(layer.config, *(_padded_to(x, device) for x in (layer.records, layer.tails, layer.sinks)))


def _padded_to(x: torch.Tensor, device: str) -> torch.Tensor:
    whole = torch.empty_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), dtype=x.dtype, device=device)
    whole.copy_(torch.as_strided(x, whole.shape, (1,), 0))
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def ints(values: list[int]) -> torch.Tensor:
    """Return an int32 tensor on the CPU."""
    return torch.tensor(values, dtype=torch.int32)
