"""A prefill in chunks of one tile through the launchers alone, as an engine drives them, checked at every chunk."""

import pytest
import torch
from tolerance import ATTEND_RMS, relative_rms

from kvarn.core.append import RotatedRows, rotate_rows, store_tail
from kvarn.core.attend import attend, attend_reference
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.layout import TileLayout
from kvarn.core.seal import seal
from kvarn.core.step import Step
from kvarn.core.tail import TailState, owner_tags
from kvarn.presets import get_preset

KV_HEADS = 2
ROWS = 40
PAGES = 64


def on_cpu(
    q: torch.Tensor, rotated: RotatedRows, layer: LayerCache, step: Step
) -> tuple[torch.Tensor, RotatedRows, LayerCache, Step]:
    """Copy what the reference needs; queries in float64."""
    tensors = {name: getattr(step, name) for name in Step.__dataclass_fields__}
    moved = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    copied = LayerCache(layer.config, layer.records.cpu(), layer.tails.cpu(), layer.sinks.cpu())
    return q.cpu().double(), RotatedRows(rotated.k.cpu(), rotated.v.cpu()), copied, Step(**moved)


@pytest.mark.parametrize("group", [4, 6])
def test_every_chunk_of_a_prefill_matches_the_reference(group, device, dtype):
    if device == "cpu" and group != 4:
        pytest.skip("one group is enough for the interpreter, which is slow")
    # fewer and smaller chunks for the interpreter
    head_dim, chunks, preset = (128, 12, "kvarn_k4v2_g128") if device == "cuda" else (64, 4, "kvarn_k4v2_g64")
    layout = TileLayout.of(get_preset(preset), head_dim)
    tile = layout.tile_tokens
    config = CacheConfig(layout, KV_HEADS, tail_tokens=tile, sink_tokens=4, ring_tokens=2 * tile)
    layer = allocate_layer(config, PAGES, ROWS, 8 * ROWS, dtype, device)
    state = TailState(config, ROWS, PAGES, 8 * ROWS, device)
    generator = torch.Generator().manual_seed(group)
    tags = owner_tags(["prefill"]).to(device)
    size = layout.tile_tokens

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    for chunk in range(chunks):
        table = ints(*range(1, chunk + 2))[None, :]
        step, _ = chunk_step(
            state, ints(ROWS - 1), ints(chunk * size), ints((chunk + 1) * size), tags, table, group, size
        )
        heads = (KV_HEADS * group, KV_HEADS, KV_HEADS)
        q, k, v = (torch.randn(size, n, head_dim, generator=generator).to(device, dtype) for n in heads)
        rotated = rotate_rows(k, v, layer, step, store=False)
        seal(rotated, layer, step)
        got, _ = attend(q, rotated, layer, step, config.rotation_norm)
        want, _ = attend_reference(*on_cpu(q, rotated, layer, step), config.rotation_norm)
        assert relative_rms(got, want) < ATTEND_RMS[dtype]
        store_tail(rotated, layer, step)
    assert int(state.own_start[ROWS - 1]) == 0
    assert int(state.faults) == 0
