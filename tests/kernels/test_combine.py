"""Merging many parts with explicit layouts, over torch where there is no GPU, against the kernel that serves all."""

import pytest
import torch
from cases import make_case, to_device
from gluon_on_torch import Emulated

from kvarn.core import combine as combine_module
from kvarn.core.combine import combine

OVER_TORCH = Emulated("gluon.combine", "combine_parts_kernel")


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("programs", [70, 300])
@pytest.mark.parametrize("sinks", [False, True])
def test_many_parts_are_merged_as_by_the_other_kernel(head_dim, programs, sinks, device, monkeypatch):
    case = make_case([30_000], [1], group=5, kv_heads=2, head_dim=head_dim, tail=64)
    generator = torch.Generator().manual_seed(0)
    parts = programs + case.step.task_request.shape[0]
    partial = torch.randn(parts, 2, case.step.columns, head_dim, generator=generator).to(device)
    lse = (8 * torch.randn(parts, 2, case.step.columns, generator=generator)).to(device)
    lse[::7] = float("-inf")
    partial[::7] = float("nan")
    logits = torch.linspace(-2, 9, 10).to(device) if sinks else None
    moved = to_device(case, device)
    results = []
    for explicit in (False, True):
        monkeypatch.setattr(combine_module, "has_explicit_merging", lambda *_, explicit=explicit: explicit)
        if device == "cpu":
            monkeypatch.setattr(combine_module, "_explicit_kernel", lambda: OVER_TORCH)
        out = torch.empty(1, 10, head_dim, dtype=torch.float16, device=device)
        results.append((combine(partial, lse, moved.layer, moved.step, out, logits), out))
    (want_lse, want), (got_lse, got) = results
    assert torch.isfinite(want).all()
    assert torch.allclose(got, want, atol=2e-3, rtol=2e-3)
    assert torch.allclose(got_lse, want_lse, atol=1e-5, rtol=1e-5)
