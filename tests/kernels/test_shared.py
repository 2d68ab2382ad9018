"""Attention whose warps share tiles against the float64 reference; without a GPU it runs over torch."""

import pytest
import torch
from cases import make_case
from test_attend import OVER_TORCH, check, forget_kernels

from kvarn.core import attend as attend_module
from kvarn.core import explicit
from kvarn.core.layout import TileLayout
from kvarn.presets import PRESETS

GPU = torch.device("cuda")
SERVED = [
    (name, head_dim)
    for name, preset in PRESETS.items()
    for head_dim in (64, 128)
    if explicit.has_explicit_layouts(TileLayout.of(preset, head_dim), GPU)
]


@pytest.fixture(autouse=True)
def kernel(request, device, monkeypatch):
    forget_kernels(request)
    if device == "cpu":
        monkeypatch.setattr(explicit, "has_explicit_layouts", lambda *_: True)
        monkeypatch.setattr(attend_module, "_attend_kernel", lambda *_: OVER_TORCH)


@pytest.mark.parametrize(("group", "drafts", "columns"), [(4, 3, 16), (8, 1, 16), (8, 3, 32), (6, 3, 32), (32, 0, 32)])
def test_tasks_of_every_width_match_reference(group, drafts, columns, device, dtype):
    case = make_case([700, 130], [1 + drafts] * 2, group=group, drafts=drafts, widest=32, dtype=dtype, head_dim=128)
    assert case.step.columns == columns
    assert explicit.shares_tiles(case.layer.config.layout, columns, case.step.rows_per_task, torch.device(device))
    check(case, device)


@pytest.mark.parametrize(("preset", "head_dim"), SERVED)
def test_drafts_match_reference_for_every_preset(preset, head_dim, device):
    check(
        make_case([400, 131], [4, 4], preset=preset, head_dim=head_dim, group=8, drafts=3, widest=32, tail=64), device
    )


@pytest.mark.parametrize("length", [1, 63, 127, 128, 129, 255, 256, 384, 1000])
def test_drafts_match_reference_at_every_kind_of_length(length, device):
    check(make_case([length], [4], group=8, drafts=3, widest=32), device)


@pytest.mark.parametrize("widest", [16, 32])
def test_chunks_match_reference(widest, device, dtype):
    check(make_case([300, 128, 5], [40, 1, 20], hits=[256, 0, 0], widest=widest, dtype=dtype), device)


@pytest.mark.parametrize(
    "more", [{"canonical": True, "tail": 0, "sink": 0}, {"slots": 1}, {"outliers": True}, {"magnitude": 0.01}]
)
def test_drafts_match_reference_whatever_the_cache(more, device):
    check(make_case([600, 300], [4, 4], group=8, drafts=3, widest=32, **more), device)


def test_soft_cap_matches_reference(device):
    check(make_case([400], [4], group=8, drafts=3, widest=32), device, logit_cap=2.0)


def test_batch_invariant_rows_match_reference(device):
    check(make_case([3000, 3, 128], [1, 1, 1], group=32, batch_invariant=True), device)
