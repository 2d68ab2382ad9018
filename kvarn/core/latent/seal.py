"""Seal: turn every tile of latents that becomes full in a step into its record."""

import torch

from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.latent.layout import LatentLayout, latent_constants
from kvarn.core.latent.reference import encode_latents
from kvarn.core.latent.rows import raw_rows, split_rows
from kvarn.core.launch import chained, launch
from kvarn.core.reference import SCALE_MAX, key_clip
from kvarn.core.seal import SEAL_TASK_BLOCK, seal_programs
from kvarn.core.step import Step

# Channels that one program quantises: all that share its words.
_CHANNELS = 128
_WARPS = 8


def seal_latents(raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step) -> None:
    """Write the records of all tiles that are full after this step.

    Rows below the committed length come from the ring, the step's own from `raw` (or all from the ring, where the step
    stores its rows first). Sealing a tile again gives the same bytes.

    Args:
        raw: the step's rows, `rotate_latents`.
        layer: the layer's cache; its records are written.
        step: the forward pass.

    Determinism: a record depends on its tile's rows alone. Graph-safe: yes (fixed grid, tiles found on the device).
    """
    if not runs_triton(layer.records):
        seal_latents_reference(raw, layer, step)
        return
    from kvarn.core.kernels.latent.seal import seal_latents_kernel

    config, layout = layer.config, layer.config.layout
    parts = layout.latent_dim // _CHANNELS + 1
    launch(
        seal_latents_kernel, (seal_programs(step, parts), parts),
        layer.tails, raw, layer.records, step.seal_request, step.seal_tile, step.rows, step.prefix_lens,
        step.seq_lens, step.query_start, step.block_table, step.seal_tile.shape[0],
        *layer.records.stride()[:2], layer.tails.stride(0), raw.stride(0), step.block_table.stride(0),
        **latent_constants(layout), RING=config.ring_tokens, TILES=config.tiles_per_block,
        LATENT_BITS=layout.latent_bits, ROPE_BITS=layout.rope_bits, LATENT_CLIP=key_clip(layout.latent_bits),
        SCALE_MAX=SCALE_MAX, ROWS_IN_RING=step.rows_in_ring, CHANNELS=_CHANNELS,
        BLOCK=SEAL_TASK_BLOCK if step.rows_in_ring else 1, **chained(layer.records.device), num_warps=_WARPS,
    )  # fmt: skip


def seal_latents_reference(raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step) -> None:
    """Seal in plain torch."""
    layout = layer.config.layout
    for request, tile in zip(step.seal_request.tolist(), step.seal_tile.tolist(), strict=True):
        if tile < 0:
            continue
        rows = raw_rows(raw, layer, step, request, tile * layout.tile_tokens, (tile + 1) * layout.tile_tokens)
        page = layer.pages_of(step.block_table[request, tile].long())
        layer.records[page] = encode_latents(split_rows(rows.float(), layout), layout)
