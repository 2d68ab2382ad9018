"""Decode over latents (MLA): correctness first, then time against attention over the same rows in bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.bars import ERROR_BAR
from benchmarks.kernels.gate import Check, checked_requests, compare, step_of
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.peers.latents import ways
from benchmarks.kernels.timing import copies_needed
from kvarn import results
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.latent.append import rotate_latents_reference
from kvarn.core.latent.attend import attend_latents_reference, latent_shape
from kvarn.core.latent.attention import latent_attention
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.reference import encode_latents
from kvarn.core.latent.rows import LatentRows, split_rows
from kvarn.core.step import Step, verify_step
from kvarn.core.tail import TailState
from kvarn.presets import get_preset

PRESET = "kvarn_k4v2_g128"
_K = 1024
# Beyond the nominal context, so that no request fills a tile, as in the median step.
_BEYOND = 64
_POOL_TILES = 64
# As absorbed queries of DeepSeek's models: keys are made for 128 + 64 channels.
_SCALE = (128 + 64) ** -0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """One decode step: query heads of a rank, requests, nominal tokens of each; widths of the latents and rope part.

    q_len: tokens that the step adds to each request: one that is certain, and drafts.
    """

    heads: int
    batch: int
    context: int
    latent_dim: int = 512
    rope_dim: int = 64
    rope_bits: int = 16
    q_len: int = 1


SHAPES = (
    *(Shape(16, batch, context) for batch in (1, 16, 64) for context in (4 * _K, 16 * _K, 32 * _K)),
    *(Shape(128, batch, context) for batch in (16, 64) for context in (16 * _K, 32 * _K)),
    Shape(16, 64, 16 * _K, rope_bits=8),
    *(Shape(16, batch, 16 * _K, q_len=4) for batch in (16, 64)),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A decode step over several layers' caches, and its rows."""

    step: Step
    layers: list[LayerCache[LatentLayout]]
    q: LatentRows
    rows: LatentRows
    packed_bytes: int

    def run(self, copy: int) -> torch.Tensor:
        """Launch the whole operation on one layer."""
        return latent_attention(*self.q, self.rows, self.layers[copy], self.step, _SCALE)

    def check(self) -> Check:
        """Run the first layer and compare some requests with float64 over the same records and raw rows."""
        layer, requests = self.layers[0], checked_requests(tuple(self.step.seq_lens.tolist()))
        out = self.run(0)
        tokens, part = step_of(self.step, requests, self.q.latent.shape[0] // self.step.rows.shape[0])
        raw = rotate_latents_reference(LatentRows(*(x[tokens] for x in self.rows)))
        q = (x[tokens].double() for x in self.q)
        want, _ = attend_latents_reference(*q, raw, layer, part, _SCALE)
        return compare(out[tokens], want)


def run(bench: Bench, out: Path, shapes: Sequence[Shape] = SHAPES, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Measure shapes; return whether all outputs were right.

    Args:
        bench: where and how to time.
        out: result file.
        shapes: what to measure.
        dtype: of the model.
    """
    rows = []
    for shape in shapes:
        rows.append(row := _measure(shape, bench, dtype))
        peer = f"bf16 {row['bf16_us']:8.1f} us ({row['bf16_peer']}), ratio {row['ratio']:.2f}" if row["bf16_us"] else ""
        print(
            f"{row['heads']:4} heads {row['batch']:3} x {row['context']:6,}, {row['q_len']} rows: {row['us']:8.1f} us, "
            f"{row['packed_tbps']:.2f} TB/s, error {row['gate_err']:.1e}; {peer}",
            flush=True,
        )
        results.write(out, rows)
    return all(row["gate_err"] <= ERROR_BAR for row in rows)


def build(shape: Shape, bench: Bench, dtype: torch.dtype) -> Workload:
    """Bring caches to life: records of a pool of tiles on shuffled pages, and rings of random rows."""
    layout = LatentLayout.of(get_preset(PRESET), shape.latent_dim, shape.rope_dim, shape.rope_bits)
    tile, device, length = layout.tile_tokens, bench.device, shape.context + _BEYOND
    drafts = shape.q_len - 1
    config = CacheConfig(layout, 1, 128, 4, 256 + -(-drafts // 64) * 64, draft_tokens=drafts)
    generator = torch.Generator(device).manual_seed(0)
    each = -(-length // tile)
    pages = 1 + torch.randperm(shape.batch * each, generator=generator, device=device)
    table = pages.to(torch.int32).view(shape.batch, each)
    state = TailState(config, shape.batch + 1, shape.batch * each + 1, shape.batch, device)
    ring_rows = torch.arange(1, shape.batch + 1, dtype=torch.int32, device=device)
    group, widest = latent_shape(layout, shape.heads, device)
    # a request that wrote its newest rows itself, so that it reads them exact
    own = (length - 1) // tile * tile - tile
    begin, end = (torch.full_like(ring_rows, at) for at in (own, length - shape.q_len))
    chunk_step(state, ring_rows, begin, end, None, table, group, shape.batch * (length - shape.q_len - own))
    step = verify_step(state, ring_rows, end + shape.q_len, table, group, shape.q_len, widest)
    tiles = _random_rows(_POOL_TILES * tile, layout, generator).view(_POOL_TILES, tile, layout.row_dim)
    pool = encode_latents(split_rows(tiles, layout), layout)
    packed = shape.batch * (own * layout.record_bytes // tile + (length - own) * layout.row_dim * dtype.itemsize)
    layers = []
    for _ in range(copies_needed(packed, bench.l2_bytes)):
        layer = allocate_layer(config, shape.batch * each + 1, shape.batch + 1, shape.batch, dtype, device)
        pick = torch.randint(_POOL_TILES, layer.records.shape[:1], generator=generator, device=device)
        layer.records[:, 0, 0] = pool[pick]
        for raw in (layer.tails, layer.sinks):
            raw.copy_(_random_rows(raw.numel() // layout.row_dim, layout, generator).view(raw.shape))
        layers.append(layer)
    tokens = shape.batch * shape.q_len
    q = torch.randn(tokens, shape.heads, layout.row_dim, generator=generator, device=device).to(dtype)
    rows = split_rows(_random_rows(tokens, layout, generator).to(dtype), layout)
    return Workload(step, layers, split_rows(q, layout), rows, packed)


def _measure(shape: Shape, bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    work = build(shape, bench, dtype)
    check = work.check()
    time = bench.timer(work.run, len(work.layers))
    row = {
        "heads": shape.heads, "batch": shape.batch, "context": shape.context, "latent_dim": shape.latent_dim,
        "rope_dim": shape.rope_dim, "rope_bits": shape.rope_bits, "q_len": shape.q_len, "preset": PRESET, "us": time.us,
        "us_p10": time.us_p10, "us_p90": time.us_p90, "packed_tbps": work.packed_bytes / time.us / 1e6,
        "limit_tbps": bench.limit_tbps, "rel_err": check.error, "gate_err": check.own_error,
    }  # fmt: skip
    q = work.q
    del work
    times = dict(_bf16_times(shape, bench, q)) if shape.q_len == 1 else {}
    if not times:
        return row | {"bf16_us": None, "bf16_peer": None, "ratio": None}
    peer = min(times, key=times.__getitem__)
    return row | {"bf16_us": times[peer], "bf16_peer": peer, "ratio": times[peer] / time.us}


def _bf16_times(shape: Shape, bench: Bench, q: LatentRows) -> Iterator[tuple[str, float]]:
    """Yield microseconds of attention over rows in the model dtype, by implementation that is right."""
    length, whole = shape.context + _BEYOND, torch.cat(q, dim=-1)
    generator = torch.Generator(bench.device).manual_seed(1)
    rows = torch.randn(shape.batch, length, whole.shape[-1], generator=generator, device=bench.device).to(whole.dtype)
    copies = [rows.clone() for _ in range(copies_needed(rows.nbytes, bench.l2_bytes))]
    scores = torch.einsum("hd,pd->hp", whole[0].double(), rows[0].double()) * _SCALE
    want = scores.softmax(dim=-1) @ rows[0, :, : shape.latent_dim].double()

    def by_products(copy: int) -> torch.Tensor:
        """Two batched matrix products: what scaled_dot_product_attention does where K and V differ in width."""
        weights = torch.softmax(torch.bmm(whole, copies[copy].mT).float() * _SCALE, dim=-1).to(whole.dtype)
        return torch.bmm(weights, copies[copy][..., : shape.latent_dim])

    for name, way in {"torch-bmm": by_products, **ways(whole, copies, shape.latent_dim, _SCALE)}.items():
        try:
            error = compare(way(0)[0], want).own_error
        except (AttributeError, RuntimeError) as reason:  # not built for this GPU or shape
            print(f"  {name} doesn't run: {str(reason).splitlines()[0]}")
            continue
        if error <= 2 * ERROR_BAR:  # weights are rounded to bf16 there
            yield name, bench.timer(way, len(copies)).us
        else:
            print(f"  {name} is wrong by {error:.1e} and doesn't count")


def _random_rows(count: int, layout: LatentLayout, generator: torch.Generator) -> torch.Tensor:
    """Return rows with a mean of their own in every channel, [count, row_dim], float32."""
    shape = (count, layout.row_dim)
    mean = torch.randn(shape[1], generator=torch.Generator(generator.device).manual_seed(2), device=generator.device)
    return mean + torch.randn(shape, generator=generator, device=generator.device)
