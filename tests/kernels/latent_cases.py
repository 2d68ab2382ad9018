"""Ragged batches over a small cache of latents, brought to life by the torch references."""

from dataclasses import dataclass, replace

import torch
from cases import ints, layer_to, next_step, poisoned_layer, shuffled_table

from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.chunk_step import chunk_step
from kvarn.core.latent.append import rotate_latents_reference, store_latents_reference
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.seal import seal_latents_reference
from kvarn.core.step import Step
from kvarn.core.tail import TailState, owner_tags


@dataclass
class LatentCase:
    """A layer's cache in mid-life and the next step over it, its rows rotated but not stored."""

    layer: LayerCache[LatentLayout]
    state: TailState
    step: Step
    rows: LatentRows
    raw: torch.Tensor
    q_latent: torch.Tensor
    q_rope: torch.Tensor

    def to(self, device: str) -> "LatentCase":
        """Copy to another device, strides of the cache kept."""

        def move(x: object) -> object:
            return x.to(device) if isinstance(x, torch.Tensor) else x

        step = Step(**{name: move(getattr(self.step, name)) for name in Step.__dataclass_fields__})
        moved = {name: getattr(self, name).to(device) for name in ("raw", "q_latent", "q_rope")}
        rows = LatentRows(*(x.to(device) for x in self.rows))
        return replace(self, layer=layer_to(self.layer, device), step=step, rows=rows, **moved)

    def store_and_seal(self) -> None:
        """Do by the references what comes before attention in a step."""
        if self.step.rows_in_ring:
            store_latents_reference(self.raw, self.layer, self.step)
        seal_latents_reference(self.raw, self.layer, self.step)


def make_latent_case(
    lengths: list[int],
    new: list[int],
    *,
    latent_dim: int = 128,
    rope_dim: int = 32,
    bits: int = 4,
    rope_bits: int = 16,
    tile: int = 64,
    heads: int = 4,
    dtype: torch.dtype = torch.float16,
    tail: int = 64,
    sink: int = 4,
    hits: list[int] | None = None,
    canonical: bool = False,
    batch_invariant: bool = False,
    tiles_per_block: int = 1,
    drafts: int = 0,
    slots: int = 2,
    pad: int = 1,
    outliers: bool = False,
    device: str = "cpu",
) -> LatentCase:
    """Grow requests to `lengths` (a chunk each, after `hits` tokens of prefix hit), then make a step of `new` rows."""
    generator = torch.Generator().manual_seed(0)
    layout = LatentLayout(latent_dim, rope_dim, tile, bits, rope_bits)
    ring = tile + tail + drafts
    config = CacheConfig(layout, 1, tail, sink, ring, canonical, batch_invariant, tiles_per_block, drafts)
    hits = hits or [0] * len(lengths)
    pages_each = [-(-(a + b) // tile) for a, b in zip(lengths, new, strict=True)]
    blocks = 1 + -(-sum(pages_each) // tiles_per_block)
    table = shuffled_table(pages_each, generator) + tiles_per_block - 1
    layer = poisoned_layer(config, blocks, len(lengths) + 2, slots, dtype, "cpu", pad)
    state = TailState(config, len(lengths) + 2, blocks, slots, "cpu")
    request_rows = torch.arange(1, len(lengths) + 1, dtype=torch.int32).flip(0)
    tags = owner_tags([f"request-{i}" for i in range(len(lengths))])

    def rows(count: int) -> LatentRows:
        x = torch.randn(count, latent_dim + rope_dim, generator=generator)
        if outliers:
            x[:, [0, 1, 7, -1]] += torch.tensor([300.0, -80.0, 40.0, 60.0])
        return LatentRows(x[:, :latent_dim].to(dtype), x[:, latent_dim:].to(dtype))

    group, widest = latent_shape(layout, heads, torch.device(device))
    for begin, end, names in (([0] * len(hits), hits, tags.flip(0)), (hits, lengths, tags)):
        count = sum(end) - sum(begin)
        if count:
            past, _ = chunk_step(state, request_rows, ints(begin), ints(end), names, table, group, count, widest=widest)
            raw = rotate_latents_reference(rows(count))
            seal_latents_reference(raw, layer, past)
            store_latents_reference(raw, layer, past)
    step = next_step(state, request_rows, lengths, new, tags, table, group, widest=widest)
    assert int(state.faults) == 0
    own = rows(sum(new))
    q_latent, q_rope = (
        torch.randn(sum(new), heads, dim, generator=generator).to(dtype) for dim in (latent_dim, rope_dim)
    )
    return LatentCase(layer, state, step, own, rotate_latents_reference(own), q_latent, q_rope)
