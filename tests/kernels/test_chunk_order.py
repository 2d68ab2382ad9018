"""Chunks store their rows before they attend where no query and no tile reads what they push out: the same bits."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_case, to_device

from kvarn.core import prefill_plan
from kvarn.core.append import rotate_rows, store_tail
from kvarn.core.attention import attention, attention_reference
from kvarn.core.seal import append_and_seal, seal


def assert_same(one: Case, other: Case) -> None:
    for name in ("records", "tails", "sinks"):
        ours, theirs = (getattr(case.layer, name).contiguous().view(torch.uint8) for case in (one, other))
        assert torch.equal(ours, theirs), name
    for name in ("k", "v"):
        assert torch.equal(getattr(one.rotated, name), getattr(other.rotated, name)), name


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("new", "settings"),
    [
        ([400], {"kv_heads": 3}),
        ([128, 200, 70], {"tiles_per_block": 3}),
        ([330], {"preset": "kvarn_k4v2_g64"}),
        ([700], {"kv_heads": 1}),
    ],
    ids=["longer than a tile", "several", "longer than the ring", "longer than what few tokens are"],
)
def test_first_chunks_are_stored_in_the_launch_that_rotates(new, settings, head_dim, device, dtype):
    if device == "cpu" and (head_dim > 64) != (settings.get("kv_heads") == 3):
        pytest.skip("one case of wider heads is enough for the interpreter, which is slow")
    made = make_case([0] * len(new), new, dtype=dtype, head_dim=head_dim, planned=True, **settings)
    one, other = (to_device(made, device) for _ in range(2))
    assert one.step.stores_first
    one.rotated = append_and_seal(one.k, one.v, one.layer, one.step)
    other.rotated = rotate_rows(other.k, other.v, other.layer, other.step, store=False)
    seal(other.rotated, other.layer, other.step)
    store_tail(other.rotated, other.layer, other.step)
    assert_same(one, other)
    assert not torch.equal(one.layer.records.cpu(), made.layer.records), "no tile was sealed"
    assert not torch.equal(one.layer.tails.cpu().nan_to_num(7.0), made.layer.tails.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("lengths", "new", "planned"),
    [([0], [200], False), ([100], [200], True), ([0, 60], [200, 3], True), ([0, 300], [200, 200], True)],
    ids=["read by kernels over tiles", "goes on", "short ones beside", "another goes on"],
)
def test_rings_that_a_step_reads_are_left_alone_until_then(lengths, new, planned, device):
    case = to_device(make_case(lengths, new, planned=planned), device)
    assert not case.step.stores_first
    before = case.layer.tails.clone()
    append_and_seal(case.k, case.v, case.layer, case.step)
    assert torch.equal(before.nan_to_num(7.0), case.layer.tails.nan_to_num(7.0))


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("lengths", "new", "hits"),
    [([256], [200], [0]), ([384, 256], [70, 130], [256, 256])],
    ids=["goes on", "hits"],
)
def test_cached_rows_are_restored_before_anything_is_stored(lengths, new, hits, reference, device, dtype):
    """Where no request reads what the same step fills, results and cache are those of the other order."""
    made = make_case(lengths, new, hits=hits, dtype=dtype, planned=True)
    cases = [to_device(made, device) for _ in range(2)]
    cases[1].step = replace(cases[1].step, hits_inside=False)
    assert [case.step.restores_first for case in cases] == [case.step.stores_first for case in cases] == [False, True]
    attend = attention_reference if reference else attention
    outs = [attend(case.q, case.k, case.v, case.layer, case.step, 0.1) for case in cases]
    assert torch.equal(*outs)
    for case in cases:
        case.rotated = cases[0].rotated
    assert_same(*cases)


def test_steps_that_restore_piece_by_piece_or_have_short_rows_or_begin_inside_a_tile_keep_their_order(monkeypatch):
    for lengths, new in (([256], [3]), ([256, 0], [100, 3]), ([0], [200]), ([256, 200], [100, 100])):
        step = make_case(lengths, new, planned=True).step
        assert not replace(step, hits_inside=False).restores_first
    monkeypatch.setattr(prefill_plan, "_WORKSPACE_BYTES", 1)
    step = make_case([256], [100], planned=True).step
    assert len(step.plan.segments) > 1
    assert not replace(step, hits_inside=False).restores_first
