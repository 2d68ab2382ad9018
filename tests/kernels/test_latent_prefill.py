"""Long chunks over latents: keys and values made from restored rows, against absorbed queries by the reference."""

from dataclasses import replace

import pytest
import torch
from latent_cases import make_latent_case
from tolerance import relative_rms

from kvarn.core import prefill_plan
from kvarn.core import warm_up as warm_up_module
from kvarn.core.flash import Spans, flash_for, flash_from, flash_reference
from kvarn.core.latent.attend import attend_latents_reference
from kvarn.core.latent.attention import latent_attention
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.prefill import prefill_latents
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill

LONG = LONG_ROWS + 6
HEADS, NOPE, VALUE = 2, 48, 32
SCALE = 0.1


@pytest.mark.parametrize(
    ("lengths", "new", "together"),
    [([0], [LONG], False), ([5, 300, 130], [1, LONG, LONG], False), ([70, 300, 5], [1, 2 * LONG, 3], True)],
    ids=["fresh", "after-short-ones", "with-short-ones"],
)
def test_long_chunks_attend_as_absorbed_queries_do(lengths, new, together, device, monkeypatch):
    case = make_latent_case(lengths, new, heads=HEADS, hits=[length // 128 * 64 for length in lengths])
    layout, dtype = case.layer.config.layout, case.raw.dtype
    generator = torch.Generator().manual_seed(1)
    key_up = torch.randn(HEADS, NOPE, layout.latent_dim, generator=generator) / layout.latent_dim**0.5
    value_up = torch.randn(HEADS, VALUE, layout.latent_dim, generator=generator) / layout.latent_dim**0.5
    nope = torch.randn(sum(new), HEADS, NOPE, generator=generator).to(dtype)
    q = torch.cat((nope, case.q_rope), dim=-1)
    moved, ups = case.to(device), (key_up.to(device), value_up.to(device))

    def project(latent: torch.Tensor) -> torch.Tensor:
        assert latent.is_contiguous()
        k, v = (torch.einsum("tl,hdl->thd", latent.float(), up).to(dtype) for up in ups)
        return torch.cat((k, v), dim=-1).flatten(1)

    heads = ExpandedHeads(HEADS, q.shape[-1], VALUE)

    monkeypatch.setattr(prefill_plan, "_WORKSPACE_BYTES", 2 * layout.tile_tokens * layout.row_dim * dtype.itemsize)
    config, place = case.layer.config, torch.device(device)
    flash = flash_for(config, dtype, place, caps_logits=False, head_dim=q.shape[-1])
    plan = plan_prefill(config, flash, dtype, lengths, new, place, layout.row_dim, together=together)
    first = plan.short_tokens
    assert plan.long_last
    assert sum(segment.restored for segment in plan.segments) >= 2 * (len(lengths) - 1 - together)
    out = torch.full((sum(new) - first, HEADS, VALUE), torch.nan, dtype=dtype, device=device)
    prefill_latents(
        q[first:].to(device), moved.rows, moved.layer, moved.step, plan, lambda x: heads.expand(x, project), SCALE, out
    )
    absorbed = torch.einsum("thd,hdl->thl", nope.double(), key_up.double())
    step = replace(case.step, plan=plan)
    mixed, _ = attend_latents_reference(absorbed, case.q_rope.double(), case.raw, case.layer, step, SCALE)
    want = torch.einsum("thl,hdl->thd", mixed, value_up.double())[first:]
    assert relative_rms(out, want) < 3e-3


def test_absorbed_queries_of_long_chunks_are_refused():
    case = make_latent_case([0], [LONG], heads=HEADS)
    config, place = case.layer.config, torch.device("cpu")
    plan = plan_prefill(config, flash_reference, torch.float16, [0], [LONG], place)
    with pytest.raises(ValueError, match="Of 70 absorbed queries only 0"):
        latent_attention(case.q_latent, case.q_rope, case.rows, case.layer, replace(case.step, plan=plan), SCALE)


def test_flash_attention_gets_values_as_wide_as_keys_unless_it_takes_narrower_ones(monkeypatch):
    seen = []

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del k, options
        seen.append(v.shape[-1])
        found = q[..., : v.shape[-1]]
        return found if out is None else out.copy_(found), torch.empty(q.shape[1], q.shape[0])

    spans = Spans(torch.empty(0), torch.empty(0), 5, 5)
    for capability, version in (((9, 0), 3), ((8, 0), 3), ((9, 0), 2)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for key, value in ((192, 128), (192, 64), (128, 128)):
            q, v = torch.ones(5, 2, key), torch.zeros(5, 2, value)
            for given in (None, torch.zeros(5, 2, value)):
                out, _ = flash_from(varlen, version=version)(q, q, v, spans, 1.0, 0.0, causal=True, out=given)
                assert given is None or out is given
                assert torch.equal(out, torch.ones(5, 2, value))
    assert seen[::2] == seen[1::2] == [128, 192, 128, *[192, 192, 128] * 2]


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
