"""Attention kernels against the float64 reference over the same records, in poisoned memory, on odd shapes."""

import copy
import dataclasses

import pytest
import torch
from cases import Case, make_case, store_and_seal, to_device, without_others
from gluon_on_torch import Emulated
from tolerance import ATTEND_MAX, ATTEND_RMS, LSE, LSE_RELATIVE, relative_max, relative_rms

from kvarn.core import attend as attend_module
from kvarn.core import explicit
from kvarn.core.attend import attend, attend_reference
from kvarn.core.step import verify_step
from kvarn.core.work import TASK_BLOCK
from kvarn.presets import PRESETS

OVER_TORCH = Emulated("gluon.attend", "attend_kernel", "gluon.codes", "gluon.record", "gluon.wide", "gluon.shared")


def forget_kernels(request: pytest.FixtureRequest) -> None:
    """Let a test choose kernels anew, and the one after it."""
    for remembered in (attend_module._attend_kernel, attend_module._constants):
        remembered.cache_clear()
        request.addfinalizer(remembered.cache_clear)


@pytest.fixture(autouse=True, params=["explicit", "triton"])
def kernel(request, device, monkeypatch):
    """Which attention kernel serves layouts that both can serve. Without a GPU the explicit one runs over torch."""
    forget_kernels(request)
    if request.param == "triton":
        monkeypatch.setattr(explicit, "has_explicit_layouts", lambda *_: False)
    elif device == "cpu":
        gpu, served = torch.device("cuda"), explicit.has_explicit_layouts
        monkeypatch.setattr(explicit, "has_explicit_layouts", lambda layout, _: served(layout, gpu))
        plain = attend_module._attend_kernel

        def chosen(layout, device):
            return OVER_TORCH if served(layout, gpu) else plain(layout, device)

        monkeypatch.setattr(attend_module, "_attend_kernel", chosen)


def check(case: Case, device: str, logit_cap: float = 0.0) -> None:
    store_and_seal(case)
    scale = case.layer.config.rotation_norm  # 1 / sqrt(head_dim)
    want, want_lse = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale, logit_cap)
    on_device = to_device(case, device)
    got, lse = attend(on_device.q, on_device.rotated, on_device.layer, on_device.step, scale, logit_cap)
    assert torch.isfinite(got).all()
    assert relative_rms(got, want) < ATTEND_RMS[got.dtype]
    assert relative_max(got, want) < ATTEND_MAX
    assert torch.allclose(lse.cpu().double(), want_lse, atol=LSE, rtol=LSE_RELATIVE)


@pytest.mark.parametrize("length", [1, 63, 127, 128, 129, 255, 256, 384, 1000])
def test_decode_matches_reference_at_every_kind_of_length(length, device, dtype):
    check(make_case([length], [1], dtype=dtype), device)


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8, 16, 32])
def test_decode_matches_reference_for_every_gqa_group(group, device):
    check(make_case([300, 5], [1, 1], group=group), device)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_decode_matches_reference_for_every_preset(preset, head_dim, device, dtype):
    check(make_case([400, 131], [1, 1], preset=preset, head_dim=head_dim, dtype=dtype, tail=64), device)


@pytest.mark.parametrize("head_dim", [192, 256, 512])
def test_decode_matches_reference_for_wide_heads(head_dim, device):
    check(make_case([400], [1], preset="kvarn_k4v2_g64", head_dim=head_dim, kv_heads=1, tail=64), device)


@pytest.mark.parametrize("head_dim", [192, 256])
def test_chunk_matches_reference_for_wide_heads(head_dim, device):
    check(make_case([370, 5], [30, 1], head_dim=head_dim, kv_heads=1), device)


@pytest.mark.parametrize("new", [[1, 1], [20, 1]])
def test_pages_that_share_a_block_are_found(new, device):
    check(make_case([760, 300], new, kv_heads=1, tiles_per_block=3), device)


@pytest.mark.parametrize("programs", [1, 2, 3, 50])
@pytest.mark.parametrize("new", [[1, 1, 1], [40, 1, 10]])
def test_result_does_not_depend_on_how_work_is_shared(programs, new, device, monkeypatch):
    monkeypatch.setattr(attend_module, "num_programs", lambda *args: programs)
    check(make_case([700, 3, 128], new, kv_heads=1), device)


@pytest.mark.parametrize(
    ("lengths", "new"), [([1500, 900, 3, 128], [1, 1, 1, 1]), ([300, 200, 5], [10, 13, 1])], ids=["decode", "chunk"]
)
def test_batch_invariant_rows_are_the_same_alone_and_in_a_batch(lengths, new, device):
    case = make_case(lengths, new, batch_invariant=True)
    store_and_seal(case)
    results = []
    for requests in (1, 2, len(lengths)):
        part = to_device(without_others(case, requests), device)
        out, lse = attend(part.q, part.rotated, part.layer, part.step, case.layer.config.rotation_norm)
        results.append((out[: new[0]].cpu(), lse[: new[0]].cpu()))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


def test_batch_invariant_rows_are_the_same_verified_and_decoded(device):
    exact = {"canonical": True, "tail": 0, "sink": 0}
    case = make_case([1500, 126], [4, 4], kv_heads=1, drafts=3, batch_invariant=True, **exact)
    store_and_seal(case)
    verified = to_device(case, device)
    together, _ = attend(verified.q, verified.rotated, verified.layer, verified.step, case.layer.config.rotation_norm)
    for row in (1, 2, 3):  # a verify step's first row is certain, so no step begins there again
        step = verify_step(
            copy.deepcopy(case.state), case.step.rows, case.step.prefix_lens + row + 1, case.step.block_table, 4, 1
        )
        q = case.q.view(2, 4, *case.q.shape[1:])[:, row].contiguous()
        part = to_device(dataclasses.replace(case, step=step, q=q), device)
        alone, _ = attend(part.q, part.rotated, part.layer, part.step, case.layer.config.rotation_norm)
        assert torch.equal(alone, together.view(2, 4, *alone.shape[1:])[:, row])


def test_batch_invariant_decode_matches_reference(device):
    check(make_case([3000, 3, 128], [1, 1, 1], batch_invariant=True), device)


def test_prefix_hit_reads_records_for_rows_it_did_not_write(device):
    check(make_case([300, 400], [1, 1], hits=[256, 128]), device)


@pytest.mark.parametrize(
    ("lengths", "new", "kv_heads"),
    # The long chunks with one head: the interpreter takes its time for every task.
    [
        ([0], [260], 1),
        ([128, 0], [129, 64], 1),
        ([383], [100], 1),
        ([300, 127, 0], [1, 150, 33], 1),
        ([511, 384], [1, 40], 2),
        ([120, 0], [9, 20], 3),
    ],
)
def test_chunk_matches_reference_with_any_prefix(lengths, new, kv_heads, device, dtype):
    check(make_case(lengths, new, kv_heads=kv_heads, dtype=dtype), device)


def test_chunk_of_more_tasks_than_a_program_looks_at_together(device, monkeypatch):
    assert [attend_module.task_block(tasks) for tasks in (1, 32, 33, 128, 129)] == [32, 32, 128, 128, TASK_BLOCK]
    monkeypatch.setattr(attend_module, "task_block", lambda _: 32)
    case = make_case([100], [40], group=16, kv_heads=1)
    assert case.step.task_request.shape[0] > 32
    check(case, device)


@pytest.mark.parametrize("group", [1, 5, 8])
def test_chunk_after_prefix_hit_matches_reference(group, device):
    check(make_case([256, 240], [20, 20], hits=[256, 128], group=group, kv_heads=1), device)


def test_canonical_chunk_reads_its_own_tiles_from_records(device):
    settings = {"preset": "kvarn_k4v2_g64", "tail": 0, "sink": 0, "canonical": True}
    check(make_case([50, 128], [90, 66], kv_heads=1, **settings), device)


@pytest.mark.parametrize(
    ("length", "new", "settings"),
    [
        # The first tile is a record for the later rows of a task and no part of what the earlier ones read.
        (120, 16, {"canonical": True, "tail": 0, "sink": 0}),
        (126, 4, {"canonical": True, "tail": 0, "sink": 0, "drafts": 3}),
        # Raw rows, some of them after all that the first row of their task reads.
        (0, 70, {}),
    ],
    ids=["chunk", "drafts", "raw"],
)
def test_a_row_for_which_a_whole_tile_is_masked_is_no_nan(length, new, settings, device):
    check(make_case([length], [new], group=1, kv_heads=1, **settings), device)


@pytest.mark.parametrize(("rows", "group"), [(2, 8), (4, 1), (4, 8), (6, 6)])
def test_drafts_match_reference_wherever_a_tile_ends(rows, group, device):
    case = make_case([600, 383, 254, 126, 0], [rows] * 5, group=group, kv_heads=1, drafts=5)
    assert case.step.rows_in_ring
    check(case, device)


@pytest.mark.parametrize(
    ("lengths", "new", "settings"),
    [
        ([700, 5], [1, 1], {"group": 16}),
        ([300, 127, 0], [4, 4, 4], {"drafts": 3}),
        ([383, 128], [40, 1], {"group": 8, "preset": "kvarn_k4v4_g128"}),
        ([400], [4], {"drafts": 3, "canonical": True, "tail": 0, "sink": 0}),
    ],
    ids=["decode", "drafts", "chunk", "canonical"],
)
def test_sixteen_columns_match_reference_at_head_dim_128(lengths, new, settings, device):
    check(make_case(lengths, new, head_dim=128, kv_heads=1, **settings), device)


@pytest.mark.parametrize(
    "settings", [{"tail": 3}, {"canonical": True, "tail": 0, "sink": 0}, {"batch_invariant": True}]
)
def test_drafts_match_reference_in_every_mode(settings, device):
    check(make_case([400, 253, 126], [4, 4, 4], hits=[256, 128, 0], drafts=3, **settings), device)


@pytest.mark.parametrize("new", [[1, 1], [50, 1]])
def test_logit_cap(new, device):
    check(make_case([300, 200], new), device, logit_cap=3.0)


def test_outlier_channels(device, dtype):
    check(make_case([600], [1], dtype=dtype, outliers=True, head_dim=128), device)


def test_without_sinks_and_without_tail(device):
    check(make_case([300, 128, 129], [1, 1, 1], tail=0, sink=0), device)


def test_sinks_wider_than_a_few_rows(device):
    check(make_case([400, 300], [1, 1], sink=16, slots=1), device)
