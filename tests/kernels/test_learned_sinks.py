"""Learned sinks: a logit of each head in the softmax's denominator, wherever parts of a row are merged."""

import pytest
import torch
from cases import Case, make_case, store_and_seal, to_device
from tolerance import ATTEND_MAX, ATTEND_RMS, LSE, LSE_RELATIVE, relative_max, relative_rms

from kvarn.core import attend as attend_module
from kvarn.core import prefill_plan
from kvarn.core.attend import attend, attend_reference
from kvarn.core.attention import attention
from kvarn.core.combine import combine
from kvarn.core.merge import merge_sinks, merge_sinks_reference
from kvarn.core.prefill_plan import LONG_ROWS

# Logits of keys here add up to about 6: sinks that take nothing, some, most and all of the weight.
INFINITY = float("inf")
LOGITS = (-1e4, 2.0, 6.5, 50.0, -INFINITY, 9.0, 4.0)
# Of long chunks: parts and output are rounded to the model dtype, and once more when sinks are merged.
OUTPUT_RMS = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def logits_of(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    heads = case.q.shape[1]
    return torch.tensor(LOGITS).repeat(heads)[:heads].to(dtype)


def check(case: Case, device: str, logit_cap: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
    store_and_seal(case)
    scale, sinks = case.layer.config.rotation_norm, logits_of(case, dtype)
    want, want_lse = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale, logit_cap, sinks)
    without, _ = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale, logit_cap)
    moved = to_device(case, device)
    got, lse = attend(moved.q, moved.rotated, moved.layer, moved.step, scale, logit_cap, sink_logits=sinks.to(device))
    assert torch.isfinite(got).all()
    assert relative_rms(got, want) < ATTEND_RMS[got.dtype]
    assert relative_max(got, want) < ATTEND_MAX
    assert torch.allclose(lse.cpu().double(), want_lse, atol=LSE, rtol=LSE_RELATIVE)
    assert relative_rms(without, want) > 0.1


@pytest.mark.parametrize("length", [1, 128, 300])
def test_decode_matches_reference_at_every_kind_of_length(length, device, dtype):
    check(make_case([length], [1], dtype=dtype), device)


@pytest.mark.parametrize(("group", "new"), [(1, [1, 1]), (5, [1, 1]), (16, [1, 1]), (5, [20, 1])])
def test_every_head_has_its_own(group, new, device):
    check(make_case([130, 5], new, group=group, kv_heads=3), device)


@pytest.mark.parametrize("head_dim", [96, 128])
def test_width_that_is_rotated_back_by_a_matrix(head_dim, device):
    check(make_case([300, 5], [1, 1], head_dim=head_dim), device)


@pytest.mark.parametrize(("programs", "new"), [(1, [1, 1, 1]), (3, [20, 1, 10]), (50, [1, 1, 1])])
def test_they_count_once_however_work_is_shared(programs, new, device, monkeypatch):
    monkeypatch.setattr(attend_module, "num_programs", lambda *args: programs)
    check(make_case([500, 3, 128], new, kv_heads=1), device)


@pytest.mark.parametrize(
    "settings",
    [{"drafts": 3}, {"drafts": 3, "canonical": True, "tail": 0, "sink": 0}, {"drafts": 3, "batch_invariant": True}],
    ids=["drafts", "canonical", "batch-invariant"],
)
def test_drafts(settings, device):
    check(make_case([253, 126], [4, 4], hits=[128, 0], kv_heads=1, **settings), device)


def test_a_row_for_which_a_whole_tile_is_masked(device):
    check(make_case([120], [16], group=3, kv_heads=1, canonical=True, tail=0, sink=0), device)


def test_keys_are_capped_and_sinks_are_not(device):
    check(make_case([300, 20], [1, 1]), device, logit_cap=3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_dtype_of_the_weights(dtype, device):
    check(make_case([5], [1]), device, dtype=dtype)


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("sink", [-INFINITY, -1e4, 0.0, 50.0])
def test_a_row_that_saw_nothing_gives_zeros_and_its_sink(programs, sink, device):
    case = to_device(make_case([300], [1]), device)
    tasks, kv_heads, columns = case.step.task_request.shape[0], case.k.shape[1], case.step.columns
    partial = torch.full((programs + tasks, kv_heads, columns, 64), float("nan"), device=device)
    lse = torch.full(partial.shape[:3], -INFINITY, device=device)
    out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype, device=device)
    sinks = torch.full((case.q.shape[1],), sink, device=device)
    merged = combine(partial, lse, case.layer, case.step, out, sinks)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.allclose(merged, sinks.expand_as(merged))


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_merging_matches_reference(head_dim, out_dtype, device):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(37, 3, head_dim, generator=generator).to(out_dtype)
    lse = torch.full((3, 40), float("nan"))
    lse[:, :37] = 20 * torch.randn(3, 37, generator=generator)
    lse[1, 5], out[5, 1] = -INFINITY, float("nan")
    sinks = torch.tensor([-INFINITY, 3.0, 50.0])
    got, by_reference = out.clone().to(device), out.clone()
    merge_sinks(got, lse.to(device)[:, :37], sinks.to(device))
    merge_sinks_reference(by_reference, lse[:, :37], sinks)
    weight = 1 / (1 + torch.exp(sinks[:, None].double() - lse[:, :37].double()))
    want = (weight.T[..., None] * out.double()).nan_to_num(0.0)
    assert torch.equal(got[:, 0].cpu(), out[:, 0])
    for x in (got.cpu(), by_reference):
        assert torch.allclose(x.double(), want, atol=1e-7, rtol=1e-3 if out_dtype is torch.float16 else 1e-5)


@pytest.mark.parametrize(
    ("lengths", "new"),
    [([0], [100]), ([300, 3], [LONG_ROWS + 6, 1]), ([390, 130], [LONG_ROWS + 6, 1])],
    ids=["fresh", "one", "mixed"],
)
def test_long_chunks_attend_as_the_reference_does(lengths, new, device, dtype, monkeypatch):
    monkeypatch.setattr(prefill_plan, "workspace_tokens", lambda config, *_: 2 * config.tile_tokens)
    case = make_case(lengths, new, dtype=dtype, planned=True, hits=[length // 256 * 128 for length in lengths])
    assert case.step.plan is not None
    moved, sinks = to_device(case, device), logits_of(case)
    scale = case.layer.config.rotation_norm
    got = attention(moved.q, moved.k, moved.v, moved.layer, moved.step, scale, sink_logits=sinks.to(device))
    store_and_seal(case)
    want, _ = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale, sink_logits=sinks)
    assert torch.isfinite(got).all()
    assert relative_rms(got, want) < OUTPUT_RMS[dtype]
    for head in (2, 5):  # a sink that takes much leaves little, and that is to be as exact
        assert relative_rms(got[:, head], want[:, head]) < 2 * OUTPUT_RMS[dtype]
