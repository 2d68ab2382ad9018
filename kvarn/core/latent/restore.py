"""Restore: cached rows of a request, whatever they are stored as, in the model's basis and dtype.

For engines that make keys and values of cached context from latents, piece by piece, when a chunk attends to it.
"""

import torch

from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.hadamard import rotate
from kvarn.core.latent.layout import LatentLayout, latent_constants
from kvarn.core.latent.reference import decode_latents
from kvarn.core.latent.rows import LatentRows, split_rows
from kvarn.core.launch import has_lop3
from kvarn.core.prefill_plan import Segment
from kvarn.core.read_rule import record_end
from kvarn.core.step import Step

# Tokens of one program; they divide a tile.
_TOKENS = 16


def restore_latents(layer: LayerCache[LatentLayout], step: Step, segment: Segment, out: torch.Tensor) -> LatentRows:
    """Restore a segment of cached tokens: those that the read rule finds in records from there, later ones exact.

    Args:
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
        rows.copy_(restore_latents_reference(layer, step, segment))
        return split_rows(rows, layout)
    from kvarn.core.kernels.latent.restore import restore_latents_kernel

    restore_latents_kernel[(-(-segment.spans.most_keys // _TOKENS), segment.begin.shape[0])](
        layer.records, layer.tails, layer.sinks, rows, step.rows, step.block_table, step.prefix_lens, step.own_start,
        step.sink_slots, segment.begin, segment.spans.key_start, segment.first, *layer.records.stride()[:2],
        layer.tails.stride(0), layer.sinks.stride(0), step.block_table.stride(0), **latent_constants(layout),
        NORM=config.rotation_norm, RING=config.ring_tokens, TILES=config.tiles_per_block, TAIL=config.tail_tokens,
        SINK=config.sink_tokens, TOKENS=_TOKENS, USE_ASM=has_lop3(out.device), num_warps=4,
    )  # fmt: skip
    return split_rows(rows, layout)


def restore_latents_reference(layer: LayerCache[LatentLayout], step: Step, segment: Segment) -> torch.Tensor:
    """Restore in plain torch, [segment.keys, row_dim], float32."""
    config, layout = layer.config, layer.config.layout
    found = []
    lengths = segment.spans.key_start.diff().tolist()
    for place, (begin, length) in enumerate(zip(segment.begin.tolist(), lengths, strict=True)):
        request, end = segment.first + place, begin + length
        at = torch.arange(begin, end, device=layer.records.device)
        tiles = slice(begin // config.tile_tokens, -(-end // config.tile_tokens))
        records = layer.records[layer.pages_of(step.block_table[request, tiles].long())]
        rows = torch.cat(decode_latents(records, layout), dim=-1).flatten(0, 2)[:length]
        prefix = step.prefix_lens[request]
        stop = record_end(config, prefix, prefix, step.own_start[request])
        ring = layer.tails[int(step.rows[request]), 0, 0, at % config.ring_tokens].float()
        rows = torch.where((at < stop)[:, None], rows, ring)
        slot = int(step.sink_slots[request])
        if slot >= 0 and int(stop) > 0:
            exact = int((at < config.sink_tokens).sum())
            rows[:exact] = layer.sinks[slot, 0, 0, begin : begin + exact].float()
        found.append(torch.cat((rotate(rows[:, : layout.latent_dim], inverse=True), rows[:, layout.latent_dim :]), -1))
    return torch.cat(found)
