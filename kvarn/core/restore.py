"""Restore: the keys and values of a segment, whatever they are stored as, in the model's basis and dtype."""

import functools

import torch

from kvarn.core.append import device_signs
from kvarn.core.cache import CacheConfig, LayerCache, layout_constants, runs_triton
from kvarn.core.hadamard import rotate, rotate_keys
from kvarn.core.launch import Constants, launch
from kvarn.core.layout import KEY_GROUP_TOKENS
from kvarn.core.prefill_plan import Segment
from kvarn.core.read_rule import record_end
from kvarn.core.reference import decode_record
from kvarn.core.step import Step, power_of_two

_CHUNK_CHANNELS = 64


def restore(
    k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, segment: Segment, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restore a segment's cached tokens, and copy the chunk's own rows behind them if it ends with these.

    Of cached tokens, those that the read rule finds in records from the chunk's first row, later ones exact.

    Args:
        k: [tokens, kv_heads, head_dim], the step's own keys; token and head strides are free. Not rotated.
        v: the same.
        layer: the layer's cache.
        step: the forward pass; its own rows are not stored yet.
        segment: which tokens.
        out: [2, at least segment.keys, kv_heads, head_dim], any float dtype, contiguous: where to write them.

    Returns:
        Keys and values, [segment.keys, kv_heads, head_dim], not rotated: parts of `out`.

    Determinism: bitwise. Graph-safe: yes.
    """
    keys, values = out[:, : segment.keys].unbind()
    if not runs_triton(layer.records):
        for part, rows in zip((keys, values), restore_reference(k, v, layer, step, segment, out.dtype), strict=True):
            part.copy_(rows)
        return keys, values
    from kvarn.core.kernels.restore import restore_kernel

    config, layout = layer.config, layer.config.layout
    device, heads = layer.records.device, config.kv_heads
    requests = segment.begin.shape[0]
    launch(
        restore_kernel, (-(-segment.spans.most_keys // KEY_GROUP_TOKENS), requests, 2 * heads),
        layer.records, layer.tails, layer.sinks, device_signs(layout.head_dim, torch.float16, device, True),
        k, v, keys, values, step.rows, step.block_table, step.prefix_lens, step.own_start, step.query_start,
        step.sink_slots, segment.begin, segment.spans.key_start, segment.first, *layer.records.stride()[:3],
        *layer.tails.stride()[:3], *layer.sinks.stride()[:3], step.block_table.stride(0), *k.stride()[:2],
        *v.stride()[:2], constants=_constants(config),
    )  # fmt: skip
    return keys, values


@functools.lru_cache(maxsize=32)  # as of `layout_constants`
def _constants(config: CacheConfig) -> Constants:
    layout = config.layout
    return Constants({
        **layout_constants(layout), "KV_HEADS": config.kv_heads, "QP": power_of_two(layout.head_dim // 4),
        "CHUNK": min(_CHUNK_CHANNELS, layout.padded_dim), "NORM": config.rotation_norm, "RING": config.ring_tokens,
        "TILES": config.tiles_per_block, "TAIL": config.tail_tokens, "SINK": config.sink_tokens,
        "num_warps": 4 if layout.head_dim <= 128 else 8,
    })  # fmt: skip


def restore_reference(
    k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, segment: Segment, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restore in plain torch."""
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    counts = segment.spans.key_start.diff().tolist()
    for place, (begin, count) in enumerate(zip(segment.begin.tolist(), counts, strict=True)):
        request = segment.first + place
        prefix, first = int(step.prefix_lens[request]), int(step.query_start[request])
        cached = min(begin + count, prefix)
        stored_k, stored_v = _stored_rows(layer, step, request, begin, cached)
        own = slice(first + cached - prefix, first + begin + count - prefix)
        found[0].append(torch.cat((rotate_keys(stored_k), k[own].to(stored_k.dtype))))
        found[1].append(torch.cat((rotate(stored_v, inverse=True), v[own].to(stored_v.dtype))))
    keys, values = (torch.cat(rows).to(dtype) for rows in found)
    return keys, values


def _stored_rows(
    layer: LayerCache, step: Step, request: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of a request's cached positions, rotated, [positions, kv_heads, head_dim], float32."""
    config = layer.config
    at = torch.arange(begin, end, device=layer.records.device)
    prefix = step.prefix_lens[request]
    stop = record_end(config, prefix, prefix, step.own_start[request])
    tiles = slice(begin // config.tile_tokens, -(-end // config.tile_tokens))
    records = layer.records[layer.pages_of(step.block_table[request, tiles].long())]
    k, v = (x.transpose(1, 2).flatten(0, 1)[: len(at)] for x in decode_record(records, config.layout))
    rows = torch.stack((k, v), dim=1)  # [positions, 2, kv_heads, head_dim]
    ring = layer.tails[int(step.rows[request])][:, :, at % config.ring_tokens].permute(2, 0, 1, 3)
    rows = torch.where((at < stop)[:, None, None, None], rows, ring.float())
    slot = int(step.sink_slots[request])
    if slot >= 0 and int(stop) > 0:
        exact = int((at < config.sink_tokens).sum())
        rows[:exact] = layer.sinks[slot][:, :, begin : begin + exact].permute(2, 0, 1, 3).float()
    return rows[:, 0], rows[:, 1]
