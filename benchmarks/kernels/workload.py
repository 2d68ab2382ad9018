"""The workload: one decode or verify step over many layers' caches in mid-life, on shuffled pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.gate import Check, cache_expected, checked_requests, compare, token_rows
from benchmarks.kernels.inputs import Inputs, take_rows
from benchmarks.kernels.timing import copies_needed
from benchmarks.kernels.traffic import Traffic, read_traffic
from kvarn.core.append import rotate_rows
from kvarn.core.attend import attend
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.capacity import ring_tokens
from kvarn.core.chunk_step import chunk_step
from kvarn.core.flash import FlashAttention
from kvarn.core.hadamard import rotate, rotate_keys
from kvarn.core.layout import TileLayout
from kvarn.core.prefill_plan import plan_prefill
from kvarn.core.reference import encode
from kvarn.core.seal import seal
from kvarn.core.step import Step, verify_step
from kvarn.core.tail import TailState, owner_tags
from kvarn.presets import get_preset

# An engine's page table is as wide as its longest context, whatever is in the batch.
TABLE_TOKENS = 128 * 1024
# Query rows of a request up to which a step verifies drafts; more are a chunk.
MOST_VERIFIED = 16
# Triton compiles anew where an argument stops being divisible by this.
_WIDTH_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Workload:
    """A step and the layers that it runs over; all layers share the step, as in an engine.

    Args:
        inputs: the step's rows.
        config: the caches' numbers.
        state: ring owners and sinks.
        block_table: [batch, pages], int32, shuffled.
        rows: [batch], int32, rings.
        step: the forward pass.
        traffic: bytes that one layer reads.
        layers: caches with different records, ring rows and sinks.
    """

    inputs: Inputs
    config: CacheConfig
    state: TailState
    block_table: torch.Tensor
    rows: torch.Tensor
    step: Step
    traffic: Traffic
    layers: list[LayerCache]

    def run(self, copy: int) -> torch.Tensor:
        """Launch the whole operation on one layer: rotate and store, seal, attend, combine."""
        inputs = self.inputs
        return attention(
            inputs.q, inputs.k, inputs.v, self.layers[copy], self.step, inputs.scale, inputs.case.logit_cap
        )

    def parts(self) -> dict[str, Callable[[int], object]]:
        """Return what launches each part of the operation alone; attend includes the merging of its partial results."""
        inputs, step = self.inputs, self.step
        rows = (inputs.k, inputs.v)
        rotated = rotate_rows(*rows, self.layers[0], step, store=False)
        return {
            "rotate": lambda copy: rotate_rows(*rows, self.layers[copy], step, store=step.rows_in_ring),
            "seal": lambda copy: seal(rotated, self.layers[copy], step),
            "attend": lambda copy: attend(
                inputs.q, rotated, self.layers[copy], step, inputs.scale, inputs.case.logit_cap
            ),
        }

    def build_step(self, _copy: int) -> Step:
        """Build the step, as an engine does once for all layers. Again and again: the state is past it then."""
        case = self.inputs.case
        return verify_step(self.state, self.rows, self.step.seq_lens, self.block_table, case.group, case.q_len)

    def check(self) -> Check:
        """Run the first layer and compare some requests with float64 over the same records, ring rows and sinks."""
        inputs, case = self.inputs, self.inputs.case
        requests = checked_requests(case.seq_lens)
        # a chunk stores its rows last, over ring rows that its queries have read
        tails = self.layers[0].tails if self.step.rows_in_ring else self.layers[0].tails.clone()
        out = self.run(0)
        layer = replace(self.layers[0], tails=tails)
        want = cache_expected(
            inputs.q, inputs.k, inputs.v, layer, self.step, requests, case.q_len, inputs.scale, case.logit_cap
        )
        return compare(out[token_rows(requests, case.q_len, out.device)], want)


def build(
    inputs: Inputs,
    l2_bytes: int,
    table_tokens: int = TABLE_TOKENS,
    *,
    hollow: bool = False,
    flash: FlashAttention | None = None,
) -> Workload:
    """Bring caches to life.

    Args:
        inputs: rows and pools.
        l2_bytes: size of the L2, which sets the number of layers.
        table_tokens: tokens that the page table is wide enough for; at least those of the longest request.
        hollow: one page stands for all, and one layer: the same launches in little memory, for compiling.
        flash: what attends long chunks; None for the kernels over tiles.
    """
    case = inputs.case
    preset = get_preset(case.preset)
    layout = TileLayout.of(preset, case.head_dim)
    drafts = case.q_len - 1 if case.q_len <= MOST_VERIFIED else 0
    ring = ring_tokens(preset, preset.tail_tokens, drafts)
    config = CacheConfig(layout, case.kv_heads, preset.tail_tokens, preset.sink_tokens, ring, draft_tokens=drafts)
    pages = [-(-length // layout.tile_tokens) for length in case.seq_lens]
    # page 0 is the engine's padding page, row 0 that of padded requests
    state = TailState(config, case.batch + 1, sum(pages) + 1, case.batch, inputs.device)
    table = _shuffled_table(inputs, pages, -(-table_tokens // layout.tile_tokens))
    rows = _shuffled(inputs, case.batch)
    step = _step(inputs, state, rows, table, flash)
    traffic = read_traffic(config, step, inputs.q.element_size())
    copies = 1 if hollow else copies_needed(traffic.total, l2_bytes)
    pools = _pools(inputs, layout)
    layers = [_layer(inputs, config, sum(pages) + 1, pools, hollow) for _ in range(copies)]
    return Workload(inputs, config, state, table, rows, step, traffic, layers)


def _shuffled(inputs: Inputs, count: int) -> torch.Tensor:
    """Return 1 to count in random order, int32."""
    return 1 + torch.randperm(count, generator=inputs.generator, device=inputs.device).int()


def _shuffled_table(inputs: Inputs, pages: list[int], width: int) -> torch.Tensor:
    """Give every request pages in random order; entries past its end name the padding page."""
    width = -(-max(*pages, width) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    table = torch.zeros(len(pages), width, dtype=torch.int32, device=inputs.device)
    for row, own in zip(table, _shuffled(inputs, sum(pages)).split(pages), strict=True):
        row[: own.shape[0]] = own
    return table


def _step(
    inputs: Inputs, state: TailState, rows: torch.Tensor, table: torch.Tensor, flash: FlashAttention | None
) -> Step:
    """Tell the state of a prefill of all that came before, then describe the step."""
    case = inputs.case
    seq_lens = inputs.seq_lens()
    prefix = seq_lens - case.q_len
    tags = owner_tags([f"request-{i}" for i in range(case.batch)]).to(inputs.device)
    past = int(prefix.sum())
    chunk_step(state, rows, torch.zeros_like(prefix), prefix, tags, table, case.group, past)
    if case.q_len <= MOST_VERIFIED:
        return verify_step(state, rows, seq_lens, table, case.group, case.q_len)
    lens = (prefix.tolist(), [case.q_len] * case.batch)
    plan = plan_prefill(state.config, flash, inputs.q.dtype, *lens, inputs.device)
    step, _ = chunk_step(state, rows, prefix, seq_lens, tags, table, case.group, case.batch * case.q_len, plan)
    return step


@dataclass(frozen=True, slots=True)
class _Pools:
    """What layers are filled with.

    Args:
        records: [tiles, kv_heads, record_bytes], uint8: the pool's tiles, sealed.
        raw: keys and values, [rows, kv_heads, head_dim] each, model dtype, rotated.
    """

    records: torch.Tensor
    raw: tuple[torch.Tensor, torch.Tensor]


def _pools(inputs: Inputs, layout: TileLayout) -> _Pools:
    rotated = (rotate_keys(inputs.key_pool), rotate(inputs.value_pool))
    shape = (-1, layout.tile_tokens, inputs.case.kv_heads, layout.head_dim)
    k, v = (rows.reshape(shape).transpose(1, 2) for rows in rotated)
    return _Pools(encode(k, v, layout), tuple(rows.to(inputs.q.dtype) for rows in rotated))


def _layer(inputs: Inputs, config: CacheConfig, pages: int, pools: _Pools, hollow: bool) -> LayerCache:
    """Fill one layer: a tile of the pool for each page and head, random rows in rings and sinks."""
    case = inputs.case
    layer = allocate_layer(config, 1 if hollow else pages, case.batch + 1, case.batch, inputs.q.dtype, inputs.device)
    heads = torch.arange(case.kv_heads, device=inputs.device)
    records = layer.records.view(-1, config.layout.record_bytes)
    tiles = inputs.pick(records.shape[0] // case.kv_heads, case.kv_heads, limit=pools.records.shape[0])
    take_rows(pools.records.flatten(0, 1), (tiles * case.kv_heads + heads).flatten(), records)
    for store in (layer.tails, layer.sinks):
        slots, _, _, length, _ = store.shape
        for which, rows in enumerate(pools.raw):
            store[:, which] = rows[inputs.pick(slots, length)].transpose(1, 2)
    if not hollow:
        return layer
    return replace(layer, records=layer.records.expand(pages, *layer.records.shape[1:]))
