"""Parts that are merged in the launch that makes them: to the bits of a launch of its own, again and again."""

from dataclasses import replace

import pytest
import torch
from cases import NAN, Case, make_case, store_and_seal, to_device
from tolerance import ATTEND_MAX, ATTEND_RMS, LSE, LSE_RELATIVE, relative_max, relative_rms

from kvarn.core import attend as attend_module
from kvarn.core.attend import attend, attend_reference
from kvarn.core.combine import CombineShape

REPLAYS = 2
LOGITS = (-1e4, 2.0, 6.5, 50.0, -float("inf"), 9.0, 4.0)


@pytest.fixture(autouse=True, params=["explicit", "triton"])
def kernel(request, device, monkeypatch):
    """Which attention kernel serves layouts that both can serve. Without a GPU there is but one."""
    if request.param == "triton":
        monkeypatch.setattr(attend_module, "has_explicit_layouts", lambda *_: False)
    elif device == "cpu":
        pytest.skip("the kernel with explicit layouts needs a GPU")


def attended(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    merging_tasks: int,
    programs: int | None,
    sinks: torch.Tensor | None,
    replays: int = REPLAYS,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attend the same step again and again, in memory that nothing is to be read from before it is written."""
    launch_shape, empty, results = attend_module.launch_shape, torch.empty, []

    def poisoned(*args, **options):
        made = empty(*args, **options)
        return made.fill_(NAN) if made.is_floating_point() else made

    with monkeypatch.context() as patch:
        patch.setattr(
            attend_module, "launch_shape", lambda *args: replace(launch_shape(*args), merging_tasks=merging_tasks)
        )
        patch.setattr(torch, "empty", poisoned)
        if programs:
            patch.setattr(attend_module, "num_programs", lambda *_: programs)
        for _ in range(replays):
            scale = case.layer.config.rotation_norm
            results.append(attend(case.q, case.rotated, case.layer, case.step, scale, sink_logits=sinks))
    return results


def check(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch, programs: int | None = None, *, sinks: bool = False
) -> None:
    """Compare with the merging kernel where it sums in the same order, and with the reference."""
    store_and_seal(case)
    heads = case.q.shape[1]
    logits = torch.tensor(LOGITS).repeat(heads)[:heads] if sinks else None
    scale = case.layer.config.rotation_norm
    want, want_lse = attend_reference(case.q.double(), case.rotated, case.layer, case.step, scale, sink_logits=logits)
    moved = to_device(case, device)
    logits = None if logits is None else logits.to(device)
    width = case.q.shape[2]
    # as many parts at a time as the attention kernel takes
    monkeypatch.setattr("kvarn.core.combine.combine_shape", lambda *_: CombineShape(1, 4096 // width, 4))
    (apart, apart_lse), *_ = attended(moved, monkeypatch, 0, programs, logits, 1)
    several = attended(moved, monkeypatch, 1 << 20, programs, logits)
    words = moved.step.arrivals.cpu()
    # launches alone are left of a word; a task of which one program has all needs none
    assert set(words.tolist()) <= {0, REPLAYS << 24}
    assert words[0] == REPLAYS << 24
    for got, lse in several:
        assert torch.equal(got, several[0][0]) and torch.equal(lse, several[0][1])
        assert relative_rms(got, want) < ATTEND_RMS[got.dtype]
        assert relative_max(got, want) < ATTEND_MAX
        assert torch.allclose(lse.cpu().double(), want_lse, atol=LSE, rtol=LSE_RELATIVE)
        if device == "cpu":  # a GPU adds the parts of a launch of its own in another order
            assert torch.equal(got, apart)
            assert torch.equal(lse, apart_lse)
        assert torch.allclose(got.float(), apart.float(), atol=1e-3, rtol=1e-2)  # a bf16 step or less


@pytest.mark.parametrize(("group", "programs"), [(1, 1), (1, 6), (4, 2), (4, 9), (8, 5), (8, 50), (16, 9)])
def test_one_request(group, programs, device, monkeypatch):
    check(make_case([500], [1], group=group, kv_heads=2 if group == 4 else 1), device, monkeypatch, programs)


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 30])
def test_programs_that_share_several_requests(programs, device, monkeypatch):
    check(make_case([400, 3, 128, 0, 290], [1] * 5, group=5, kv_heads=1), device, monkeypatch, programs)


@pytest.mark.parametrize("length", [0, 1, 31, 128, 300])
def test_as_many_programs_as_there_is_work_for_or_more(length, device, monkeypatch):
    check(make_case([length], [1], kv_heads=1), device, monkeypatch, 99)


def test_more_parts_than_are_taken_at_a_time(device, monkeypatch):
    check(make_case([4600], [1], head_dim=128, kv_heads=1, group=2), device, monkeypatch, 99)


@pytest.mark.parametrize("programs", [1, 6])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_learned_sinks(head_dim, programs, device, dtype, monkeypatch):
    case = make_case([300, 3], [1, 1], head_dim=head_dim, dtype=dtype, group=3, kv_heads=1)
    check(case, device, monkeypatch, programs, sinks=True)


@pytest.mark.parametrize(("rows", "group"), [(2, 8), (3, 8), (4, 4), (6, 6)])
def test_drafts_of_which_some_fill_no_task(rows, group, device, monkeypatch):
    check(make_case([600, 126, 0], [rows] * 3, group=group, kv_heads=1, drafts=5), device, monkeypatch, 8)


@pytest.mark.parametrize("settings", [{"tail": 3}, {"canonical": True, "tail": 0, "sink": 0}])
def test_other_modes(settings, device, monkeypatch):
    check(make_case([400, 253], [1, 1], hits=[256, 128], kv_heads=1, **settings), device, monkeypatch, 8)


def test_another_number_of_programs_in_the_next_launch(device, monkeypatch):
    case = to_device(make_case([700, 90], [1, 1]), device)
    store_and_seal(case)
    results = [attended(case, monkeypatch, 64, programs, None, 1)[0] for programs in (7, 2, 30)]
    for out, _ in results:
        assert torch.allclose(out.float(), results[0][0].float(), atol=1e-3, rtol=4e-3)
    assert (case.step.arrivals & 0xFFFFFF == 0).all()


@pytest.mark.parametrize(
    ("lengths", "new", "settings"),
    [([300, 5], [40, 3], {}), ([300], [1], {"batch_invariant": True}), ([300], [1], {"head_dim": 96})],
    ids=["chunk", "batch-invariant", "width"],
)
def test_steps_whose_parts_are_merged_later(lengths, new, settings, device, monkeypatch):
    case = make_case(lengths, new, **settings)
    shape = replace(attend_module.launch_shape(case.layer.config.layout, 8, torch.device(device)), merging_tasks=64)
    assert not attend_module.merges_parts(case.layer.config, shape, case.step)
