"""A request that hits pages which another one fills in the same step reads what it would read in the next step."""

from collections.abc import Callable

import pytest
import torch
from cases import ints, poisoned_layer
from tolerance import ATTEND_RMS, relative_rms

from kvarn.core.attention import attention, attention_reference
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.chunk_step import chunk_step
from kvarn.core.explicit import VERIFY_COLUMNS
from kvarn.core.flash import flash_for
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import expanded_attention, latent_attention
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import split_rows
from kvarn.core.layout import TileLayout
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill
from kvarn.core.step import Step
from kvarn.core.tail import TailState, owner_tags

TILE, WIDTH = 64, 160
# The first prompt fills two tiles and begins a third; the second one hits those two and adds a long chunk.
FIRST, SHARED, OWN = 2 * TILE + 20, 2 * TILE, LONG_ROWS + 6
PREFIXES, ENDS = (0, SHARED), (FIRST, SHARED + OWN)
TABLES = ([1, 2, 3, 0], [1, 2, 4, 5])
DENSE, LATENT = TileLayout(64, TILE, 4, 4), LatentLayout(128, WIDTH - 128, TILE, 4)
HEADS = ExpandedHeads(2, 48, 16)
MADE = HEADS.count * (HEADS.key_width - LATENT.rope_dim + HEADS.value_width)
Attend = Callable[[torch.Tensor, LayerCache, Step], torch.Tensor]


def dense(x: torch.Tensor, layer: LayerCache, step: Step) -> torch.Tensor:
    """Attend with queries, keys and values that are parts of the same rows."""
    return attention(*(x[:, None, at : at + DENSE.head_dim] for at in (0, 32, 96)), layer, step, 0.1)


def dense_reference(x: torch.Tensor, layer: LayerCache, step: Step) -> torch.Tensor:
    """Do the same in plain torch."""
    return attention_reference(*(x[:, None, at : at + DENSE.head_dim] for at in (0, 32, 96)), layer, step, 0.1)


def latents(x: torch.Tensor, layer: LayerCache, step: Step) -> torch.Tensor:
    """Attend to rows that are latents, with themselves as queries, absorbed ones or, if that is planned, others."""
    rows, q = split_rows(x, LATENT), x[:, None].expand(-1, HEADS.count, -1)
    if step.plan is None:
        return latent_attention(*split_rows(q, LATENT), rows, layer, step, 0.1)
    up = torch.linspace(-0.1, 0.1, LATENT.latent_dim * MADE, device=x.device).view(-1, MADE).to(x.dtype)
    q = q[..., : HEADS.key_width]
    return expanded_attention(q, rows, layer, step, step.plan, HEADS, lambda latent: latent @ up, 0.1)


@pytest.mark.parametrize(
    ("attend", "layout", "planned"),
    [
        (dense, DENSE, False),
        (dense_reference, DENSE, False),
        (dense, DENSE, True),
        (latents, LATENT, False),
        (latents, LATENT, True),
    ],
    ids=["tiles", "reference", "flash", "absorbed", "expanded"],
)
def test_hit_reads_what_is_sealed_in_the_same_step(
    attend: Attend, layout: TileLayout | LatentLayout, planned: bool, device: str
) -> None:
    dtype, x = torch.float16, torch.randn(FIRST + OWN, WIDTH, generator=torch.Generator().manual_seed(0))
    x, place, tags = x.to(device, dtype), torch.device(device), owner_tags(["first", "second"]).to(device)
    config = CacheConfig(layout, 1, tail_tokens=TILE, sink_tokens=4, ring_tokens=2 * TILE)
    flash = flash_for(config, dtype, place, caps_logits=False, head_dim=HEADS.key_width) if planned else None
    group, widest = latent_shape(LATENT, HEADS.count, place) if layout is LATENT else (1, VERIFY_COLUMNS)

    def run(steps: list[list[int]]) -> torch.Tensor:
        layer = poisoned_layer(config, 8, 4, 2, dtype, device, 1)
        state, out = TailState(config, 4, 8, 2, device), torch.empty(0)
        for requests in steps:
            prefixes, ends = ([values[i] for i in requests] for values in (PREFIXES, ENDS))
            lengths = [end - begin for begin, end in zip(prefixes, ends, strict=True)]
            table = ints([TABLES[i] for i in requests]).to(device)
            plan = plan_prefill(config, flash, dtype, prefixes, lengths, place)
            assert (plan is not None) == planned
            step, _ = chunk_step(
                state, ints([i + 1 for i in requests]).to(device), ints(prefixes).to(device), ints(ends).to(device),
                tags[requests], table, group, sum(lengths), plan, widest,
            )  # fmt: skip
            out = attend(torch.cat([x.split((FIRST, OWN))[i] for i in requests]), layer, step)
        return out[-OWN:]

    later = run([[0], [1]])
    assert later.isfinite().all()
    assert relative_rms(run([[0, 1]]), later) < ATTEND_RMS[dtype]
