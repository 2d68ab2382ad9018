"""Long chunks: restoring, merging and the whole operation against references, in poisoned memory, on odd shapes."""

import pytest
import torch
from cases import make_case, store_and_seal, to_device
from tolerance import relative_max, relative_rms

from kvarn.core import prefill_plan
from kvarn.core.attend import attend_reference
from kvarn.core.attention import attention
from kvarn.core.merge import merge, merge_reference
from kvarn.core.prefill_plan import LONG_ROWS, PrefillPlan, plan_prefill
from kvarn.core.restore import restore, restore_reference
from kvarn.presets import PRESETS

# Restored rows, the parts of the output and the output itself are rounded to the model dtype.
OUTPUT_RMS = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
LONG = LONG_ROWS + 6


@pytest.fixture
def small_workspace(monkeypatch):
    """Two tiles at a time, so that a few hundred tokens make several segments."""
    monkeypatch.setattr(prefill_plan, "workspace_tokens", lambda config, *_: 2 * config.tile_tokens)


def check_restored(device: str, lengths: list[int], new: list[int], **options: object) -> None:
    case = make_case(lengths, new, planned=True, **options)
    moved = to_device(case, device)
    strided = torch.cat((moved.k, moved.v), dim=-1).split(case.k.shape[-1], dim=-1)
    assert case.step.plan.most_restored
    for segment, on_device in zip(case.step.plan.segments, moved.step.plan.segments, strict=True):
        if not segment.restored:
            continue
        want = restore_reference(case.k, case.v, case.layer, case.step, segment, torch.float32)
        room = torch.full((2, segment.keys + 3, *case.k.shape[1:]), float("nan"), dtype=case.k.dtype, device=device)
        got = restore(*strided, moved.layer, moved.step, on_device, room)
        for x, y in zip(got, want, strict=True):
            assert torch.isfinite(x).all()
            assert relative_max(x, y) < 3e-3
        assert torch.isnan(room[:, segment.keys :]).all()


def positions(plan: PrefillPlan) -> list[tuple[int, int]]:
    """The request and the position of every key that a plan's segments hold."""
    found = []
    for segment in plan.segments:
        counts = segment.spans.key_start.diff().tolist()
        for place, (begin, count) in enumerate(zip(segment.begin.tolist(), counts, strict=True)):
            found += [(segment.first + place, begin + i) for i in range(count)]
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_restored_rows_match_reference_for_every_preset(preset, head_dim, device):
    check_restored(device, [300], [LONG], preset=preset, head_dim=head_dim, kv_heads=1, tail=64)


@pytest.mark.parametrize("head_dim", [128, 192, 256])
def test_restored_rows_match_reference_for_wide_heads(head_dim, device, dtype):
    check_restored(device, [300], [LONG], head_dim=head_dim, kv_heads=1, dtype=dtype)


@pytest.mark.usefixtures("small_workspace")
def test_restored_rows_match_reference_in_ragged_segments(device):
    lengths, new = [700, 40, 0, 129, 384], [LONG, LONG, LONG, 3, LONG]
    check_restored(device, lengths, new, hits=[512, 0, 0, 0, 256], tiles_per_block=2, outliers=True, slots=1)


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_merge_matches_reference(head_dim, out_dtype, device):
    generator = torch.Generator().manual_seed(0)
    out, part = (torch.randn(37, 3, head_dim, generator=generator) for _ in range(2))
    lses = [torch.full((3, 40), float("nan")) for _ in range(2)]
    for lse in lses:
        lse[:, :37] = 20 * torch.randn(3, 37, generator=generator)
    got = out.to(device, out_dtype), lses[0].to(device)[:, :37]
    want = out.to(out_dtype), lses[0].clone()[:, :37]
    merge(*got, part.to(device, torch.float16), lses[1].to(device)[:, :37])
    merge_reference(*want, part.half(), lses[1][:, :37])
    assert torch.allclose(got[0].cpu().float(), want[0].float(), atol=2e-3)
    assert torch.allclose(got[1].cpu(), want[1], atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "new"),
    [([0], [100]), ([300, 3], [LONG, 1]), ([390, 130, 0, 140], [LONG, 1, LONG, LONG])],
    ids=["fresh", "one", "mixed"],
)
@pytest.mark.usefixtures("small_workspace")
def test_long_chunks_attend_as_the_reference_does(lengths, new, device, dtype):
    case = make_case(lengths, new, dtype=dtype, planned=True, hits=[length // 256 * 128 for length in lengths])
    moved = to_device(case, device)
    scale = case.layer.config.rotation_norm
    got = attention(moved.q, moved.k, moved.v, moved.layer, moved.step, scale)
    store_and_seal(case)
    want, _ = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale)
    assert torch.isfinite(got).all()
    assert relative_rms(got, want) < OUTPUT_RMS[dtype]


def test_plan_leaves_short_chunks_to_the_kernels_over_tiles():
    config = make_case([0], [1]).layer.config
    flash = object()
    place = torch.device("cpu")
    assert plan_prefill(config, flash, torch.float16, [0, 5], [LONG_ROWS, 1], place) is None
    assert plan_prefill(config, None, torch.float16, [0], [LONG], place) is None
    plan = plan_prefill(config, flash, torch.float16, [0, 9, 0], [LONG, 7, LONG], place)
    assert (plan.short_tokens, plan.short_requests) == (7, 1)
    assert [segment.tokens for segment in plan.segments] == [slice(0, LONG), slice(LONG + 7, 2 * LONG + 7)]
    assert plan.most_restored == 0


def test_requests_that_attend_together_are_long_if_their_rows_are_worth_restoring_for():
    config, flash, place = make_case([0], [1]).layer.config, object(), torch.device("cpu")

    def plan(prefixes: list[int], rows: list[int]) -> PrefillPlan | None:
        return plan_prefill(config, flash, torch.float16, prefixes, rows, place, together=True)

    assert plan([500], [LONG_ROWS]) is None
    assert plan([500], [LONG_ROWS + 1]) is not None
    # one decode row over a short context beside a long chunk, and many over long ones
    assert plan([5000] * 40 + [0], [1] * 40 + [LONG]) is None
    found = plan([9, 300], [1, 2 * LONG])
    assert (found.short_tokens, found.short_requests, found.most_short, found.long_last) == (0, 0, 0, True)
    assert [segment.tokens for segment in found.segments] == [slice(0, 1 + 2 * LONG)]
    assert found.most_restored == 9 + 1 + 300 + 2 * LONG


@pytest.mark.usefixtures("small_workspace")
def test_segments_hold_every_key_of_long_chunks_once_and_fit_the_workspace():
    config = make_case([0], [1]).layer.config
    prefixes, rows = [1000, 5, 0, 77, 300, 200], [LONG, LONG, LONG, 1, LONG, 2 * LONG]
    plan = plan_prefill(config, object(), torch.float16, prefixes, rows, torch.device("cpu"))
    assert positions(plan) == [(i, at) for i in (0, 1, 2, 4, 5) for at in range(prefixes[i] + rows[i])]
    assert plan.most_restored <= 2 * config.tile_tokens
    for segment in plan.segments:
        begins = segment.begin.tolist()
        assert all(begin % config.tile_tokens == 0 for begin in begins) or not segment.restored
        assert segment.opens == (not any(begins))
        ends = [begin + count for begin, count in zip(begins, segment.spans.key_start.diff().tolist(), strict=True)]
        lengths = [prefixes[segment.first + i] + rows[segment.first + i] for i in range(len(begins))]
        assert segment.causal == (ends == lengths)


def test_a_chunk_over_cached_context_attends_in_one_call_where_both_fit_the_workspace():
    config = make_case([0], [1]).layer.config
    plan = plan_prefill(config, object(), torch.float16, [500, 31], [LONG, LONG], torch.device("cpu"))
    assert [(segment.restored, segment.causal, segment.opens) for segment in plan.segments] == [(True, True, True)]
    assert plan.segments[0].spans.key_start.tolist() == [0, 500 + LONG, 531 + 2 * LONG]
