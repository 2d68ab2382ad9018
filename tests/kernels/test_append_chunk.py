"""Chunks are rotated, stored and sealed in one launch: the same bits as by one launch for each."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_case, to_device

from kvarn.core import prefill_plan
from kvarn.core import seal as seal_module
from kvarn.core.append import rotate_rows, store_tail
from kvarn.core.attention import attention, attention_reference
from kvarn.core.seal import append_and_seal, seal

# Tokens before and in the step: first chunks, ones that go on inside a tile or fill it, some short of a tile.
CHUNKS = {
    "first": ([0], [400], {"planned": True}),
    "first ones": ([0, 0, 0], [128, 200, 70], {"planned": True, "kv_heads": 3}),
    "longer than the ring": ([0], [330], {"planned": True, "preset": "kvarn_k4v2_g64"}),
    "goes on": ([200], [200], {"planned": True}),
    "beside hits": ([0, 128, 300], [100, 130, 84], {"planned": True, "hits": [0, 128, 0]}),
    "short": ([255, 0, 127, 300], [3, 20, 1, 90], {}),
    "some short": ([127, 0], [1, 200], {"planned": True}),
    "blocks of tiles": ([60, 0], [200, 129], {"planned": True, "tiles_per_block": 3}),
}


def step_by_step(case: Case) -> None:
    """Rotate, seal and store by a launch each."""
    case.rotated = rotate_rows(case.k, case.v, case.layer, case.step, store=False)
    seal(case.rotated, case.layer, case.step)
    store_tail(case.rotated, case.layer, case.step)


def at_once(case: Case) -> None:
    case.rotated = append_and_seal(case.k, case.v, case.layer, case.step)
    if not case.step.stores_first:
        store_tail(case.rotated, case.layer, case.step)


def assert_same(one: Case, other: Case) -> None:
    for name in ("records", "tails", "sinks"):
        ours, theirs = (getattr(case.layer, name).contiguous().view(torch.uint8) for case in (one, other))
        assert torch.equal(ours, theirs), name
    for name in ("k", "v"):
        assert torch.equal(getattr(one.rotated, name), getattr(other.rotated, name)), name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", CHUNKS)
def test_one_launch_does_what_three_do(name, head_dim, device, dtype):
    lengths, new, settings = CHUNKS[name]
    if device == "cpu" and head_dim > 64 and name != "first ones":
        pytest.skip("one case of wider heads is enough for the interpreter, which is slow")
    made = make_case(lengths, new, dtype=dtype, head_dim=head_dim, **settings)
    cases = [to_device(made, device) for _ in range(2)]
    for case in cases:  # strided rows, as a model's fused projection leaves them
        case.k, case.v = torch.cat((case.k, case.v), dim=1).split([case.k.shape[1], case.v.shape[1]], dim=1)
    at_once(cases[0])
    step_by_step(cases[1])
    assert_same(*cases)
    assert not torch.equal(cases[0].layer.records.cpu(), made.layer.records) or max(new) < 64, "no tile was sealed"


@pytest.mark.parametrize("preset", ["kvarn_k8v4_g128", "kvarn_k3v3_g128", "kvarn_k2v2_g128"])
def test_other_presets_are_sealed_alike(preset, device):
    made = make_case([130], [300], preset=preset, head_dim=64)
    cases = [to_device(made, device) for _ in range(2)]
    at_once(cases[0])
    step_by_step(cases[1])
    assert_same(*cases)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_a_first_chunk_is_stored_before_it_is_attended_to(head_dim, device, monkeypatch):
    """By whatever launches: nothing before it stands in the ring."""
    case = to_device(make_case([0], [200], head_dim=head_dim, planned=True), device)
    assert case.step.stores_first
    assert not case.layer.tails.isfinite().any()
    append_and_seal(case.k, case.v, case.layer, case.step)
    stored = case.layer.tails.clone()
    assert stored.isfinite().any()
    store_tail(rotate_rows(case.k, case.v, case.layer, case.step, store=False), case.layer, case.step)
    assert torch.equal(stored.nan_to_num(7.0), case.layer.tails.nan_to_num(7.0))


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


def test_few_small_chunks_take_one_launch_and_others_write_the_same(device, monkeypatch):
    rotated = []
    monkeypatch.setattr(
        seal_module, "rotate_rows", lambda *args, **named: rotated.append(1) or rotate_rows(*args, **named)
    )
    made = make_case([0], [200], planned=True)
    one = to_device(made, device)
    at_once(one)
    assert not rotated
    for name, most in (("CHUNK_AT_ONCE", 199), ("CHUNK_PROGRAMS", 10)):
        other = to_device(made, device)
        with monkeypatch.context() as patch:
            patch.setattr(seal_module, name, most)
            at_once(other)
        assert rotated.pop()
        assert_same(one, other)


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("lengths", "new", "hits", "at_once"),
    [([256], [200], [0], 1024), ([384, 256], [70, 130], [256, 256], 1024), ([256], [200], [0], 0)],
    ids=["goes on", "hits", "large"],
)
def test_cached_rows_are_restored_before_anything_is_stored(
    lengths, new, hits, at_once, reference, device, dtype, monkeypatch
):
    """Where no request reads what the same step fills, results and cache are those of the other order."""
    monkeypatch.setattr(seal_module, "CHUNK_AT_ONCE", at_once)
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
