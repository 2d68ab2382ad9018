"""Long chunks over latents: keys and values made from restored rows, against absorbed queries by the reference."""

from dataclasses import replace

import pytest
import torch
from latent_cases import make_latent_case
from tolerance import relative_rms

from kvarn.core import prefill_plan
from kvarn.core import warm_up as warm_up_module
from kvarn.core.flash import flash_for
from kvarn.core.latent.attend import attend_latents_reference
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.prefill import prefill_latents
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill

LONG = LONG_ROWS + 6
HEADS, NOPE, VALUE = 2, 48, 32
SCALE = 0.1


@pytest.mark.parametrize(
    ("lengths", "new"), [([0], [LONG]), ([5, 300, 130], [1, LONG, LONG])], ids=["fresh", "after-short-ones"]
)
def test_long_chunks_attend_as_absorbed_queries_do(lengths, new, device, monkeypatch):
    case = make_latent_case(lengths, new, heads=HEADS, hits=[length // 128 * 64 for length in lengths])
    layout, dtype = case.layer.config.layout, case.raw.dtype
    generator = torch.Generator().manual_seed(1)
    key_up = torch.randn(HEADS, NOPE, layout.latent_dim, generator=generator) / layout.latent_dim**0.5
    value_up = torch.randn(HEADS, VALUE, layout.latent_dim, generator=generator) / layout.latent_dim**0.5
    nope = torch.randn(sum(new), HEADS, NOPE, generator=generator).to(dtype)
    q = torch.cat((nope, case.q_rope), dim=-1)
    moved, ups = case.to(device), (key_up.to(device), value_up.to(device))

    def expand(rows: LatentRows) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (torch.einsum("tl,hdl->thd", rows.latent.float(), up).to(dtype) for up in ups)
        return torch.cat((k, rows.rope[:, None].expand(-1, HEADS, -1)), dim=-1), v

    monkeypatch.setattr(prefill_plan, "_WORKSPACE_BYTES", 2 * layout.tile_tokens * layout.row_dim * dtype.itemsize)
    config, place = case.layer.config, torch.device(device)
    flash = flash_for(config, dtype, place, caps_logits=False, head_dim=q.shape[-1])
    plan = plan_prefill(config, flash, dtype, lengths, new, place, layout.row_dim)
    first = plan.short_tokens
    assert plan.long_last
    assert len(plan.segments) >= 2 * len(lengths[1:])
    out = torch.full((sum(new) - first, HEADS, VALUE), torch.nan, dtype=dtype, device=device)
    prefill_latents(q[first:].to(device), moved.rows, moved.layer, moved.step, plan, expand, SCALE, out)
    absorbed = torch.einsum("thd,hdl->thl", nope.double(), key_up.double())
    step = replace(case.step, plan=plan)
    mixed, _ = attend_latents_reference(absorbed, case.q_rope.double(), case.raw, case.layer, step, SCALE)
    want = torch.einsum("thl,hdl->thd", mixed, value_up.double())[first:]
    assert relative_rms(out, want) < 3e-3


def test_warm_up_writes_nothing_but_padding(device, monkeypatch):
    if device == "cpu":  # the interpreter is slow, and has no variants
        monkeypatch.setattr(warm_up_module, "_TASKS", (1,))
        monkeypatch.setattr(warm_up_module, "_LONG_CHUNK", LONG)
    case = make_latent_case([130], [1], heads=HEADS).to(device)
    layer, layout = case.layer, case.layer.config.layout
    kept = [x.clone() for x in (layer.records[1:], layer.tails[1:], layer.sinks)]
    key_width = NOPE + layout.rope_dim
    flash = flash_for(layer.config, layer.tails.dtype, layer.records.device, caps_logits=False, head_dim=key_width)
    layer.records[0], layer.tails[0] = 0xFF, float("nan")
    warm_up_latents(layer, ExpandedHeads(HEADS, key_width, VALUE), flash)
    for now, before in zip((layer.records[1:], layer.tails[1:], layer.sinks), kept, strict=True):
        assert torch.equal(now.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
    assert torch.isfinite(layer.tails[0, :, :1, 0]).all(), "no ring was written: nothing ran"
