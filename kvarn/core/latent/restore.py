"""Restore: the rows of a segment, whatever they are stored as, in the model's basis and dtype.

For engines that make keys and values of cached context from latents, piece by piece, when a chunk attends to it.
"""

import torch

from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.hadamard import rotate
from kvarn.core.latent.layout import LatentLayout, latent_constants
from kvarn.core.latent.reference import decode_latents
from kvarn.core.latent.rows import LatentRows, split_rows
from kvarn.core.launch import has_lop3, launch
from kvarn.core.prefill_plan import Segment
from kvarn.core.read_rule import record_end
from kvarn.core.step import Step

# Tokens of one program; they divide a tile.
_TOKENS = 16


def restore_latents(
    own: LatentRows, layer: LayerCache[LatentLayout], step: Step, segment: Segment, out: torch.Tensor
) -> LatentRows:
    """Restore a segment's cached tokens, and copy the chunk's own rows behind them if it ends with these.

    Of cached tokens, those that the read rule finds in records from the chunk's first row, later ones exact.

    Args:
        own: the step's latents and rope parts; token strides are free.
        layer: the layer's cache.
        step: the forward pass; its own rows are not stored yet.
        segment: which tokens.
        out: [at least segment.keys, row_dim], any float dtype, contiguous: where to write them.

    Returns:
        Latents [segment.keys, latent_dim], not rotated, and rope parts [segment.keys, rope_dim]: parts of `out`.

    Determinism: bitwise. Graph-safe: yes.
    """
    config, layout = layer.config, layer.config.layout
    rows = out[: segment.keys]
    if not runs_triton(layer.records):
        rows.copy_(restore_latents_reference(own, layer, step, segment))
        return split_rows(rows, layout)
    from kvarn.core.kernels.latent.restore import restore_latents_kernel

    launch(
        restore_latents_kernel, (-(-segment.spans.most_keys // _TOKENS), segment.begin.shape[0]),
        layer.records, layer.tails, layer.sinks, own.latent, own.rope, rows, step.rows, step.block_table,
        step.prefix_lens, step.own_start, step.query_start, step.sink_slots, segment.begin, segment.spans.key_start,
        segment.first, *layer.records.stride()[:2], layer.tails.stride(0), layer.sinks.stride(0),
        step.block_table.stride(0), own.latent.stride(0), own.rope.stride(0), **latent_constants(layout),
        NORM=config.rotation_norm, RING=config.ring_tokens, TILES=config.tiles_per_block, TAIL=config.tail_tokens,
        SINK=config.sink_tokens, TOKENS=_TOKENS, USE_ASM=has_lop3(out.device), num_warps=4,
    )  # fmt: skip
    return split_rows(rows, layout)


def restore_latents_reference(
    own: LatentRows, layer: LayerCache[LatentLayout], step: Step, segment: Segment
) -> torch.Tensor:
    """Restore in plain torch, [segment.keys, row_dim], float32."""
    latent_dim = layer.config.layout.latent_dim
    found = []
    counts = segment.spans.key_start.diff().tolist()
    for place, (begin, count) in enumerate(zip(segment.begin.tolist(), counts, strict=True)):
        request = segment.first + place
        prefix, first = int(step.prefix_lens[request]), int(step.query_start[request])
        cached = min(begin + count, prefix)
        rows = _stored_rows(layer, step, request, begin, cached)
        found.append(torch.cat((rotate(rows[:, :latent_dim], inverse=True), rows[:, latent_dim:]), -1))
        fresh = slice(first + cached - prefix, first + begin + count - prefix)
        found.append(torch.cat((own.latent[fresh], own.rope[fresh]), dim=-1).float())
    return torch.cat(found)


def _stored_rows(layer: LayerCache[LatentLayout], step: Step, request: int, begin: int, end: int) -> torch.Tensor:
    """Return the raw rows of a request's cached positions, rotated, [positions, row_dim], float32."""
    config = layer.config
    at = torch.arange(begin, end, device=layer.records.device)
    tiles = slice(begin // config.tile_tokens, -(-end // config.tile_tokens))
    records = layer.records[layer.pages_of(step.block_table[request, tiles].long())]
    rows = torch.cat(decode_latents(records, config.layout), dim=-1).flatten(0, 2)[: end - begin]
    prefix = step.prefix_lens[request]
    stop = record_end(config, prefix, prefix, step.own_start[request])
    ring = layer.tails[int(step.rows[request]), 0, 0, at % config.ring_tokens].float()
    rows = torch.where((at < stop)[:, None], rows, ring)
    slot = int(step.sink_slots[request])
    if slot >= 0 and int(stop) > 0:
        exact = int((at < config.sink_tokens).sum())
        rows[:exact] = layer.sinks[slot, 0, 0, begin : begin + exact].float()
    return rows
