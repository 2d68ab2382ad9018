"""Warm-up leaves a server's cache and state alone, and compiles all that steps launch."""

import pytest
import torch
from cases import make_case, to_device

from kvarn.core import warm_up as warm_up_module
from kvarn.core.attention import attention
from kvarn.core.flash import flash_for
from kvarn.core.prefill_plan import LONG_ROWS
from kvarn.core.warm_up import warm_up

GROUP = 4


def test_nothing_but_padding_is_written(device, monkeypatch):
    if device == "cpu":  # the interpreter is slow, and has no variants
        monkeypatch.setattr(warm_up_module, "_TASKS", (1, 3))
        monkeypatch.setattr(warm_up_module, "_LONG_CHUNK", LONG_ROWS + 3)
    case = to_device(make_case([300], [1], head_dim=96, kv_heads=1, tiles_per_block=2), device)
    layer = case.layer
    kept = [x.clone() for x in (layer.records[1:], layer.tails[1:], layer.sinks)]
    flash = flash_for(layer.config, layer.tails.dtype, layer.records.device, caps_logits=False)
    layer.records[0], layer.tails[0] = 0xFF, float("nan")
    warm_up(layer, GROUP, flash)
    for now, before in zip((layer.records[1:], layer.tails[1:], layer.sinks), kept, strict=True):
        assert torch.equal(now.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
    assert torch.isfinite(layer.tails[0, :, :1, 0]).all(), "no ring was written: nothing ran"


@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([300, 5], [1, 1]),
        ([0], [3]),
        ([777, 1300], [63, 1]),
        ([0, 600], [700, 65]),
        ([0], [700]),
        ([0], [70]),
        ([2000] * 3, [64, 9, 900]),
    ],
)
def test_no_step_compiles_after_it(lengths, new, device, monkeypatch):
    if device == "cpu":
        pytest.skip("the interpreter compiles nothing")
    import triton

    case = to_device(make_case(lengths, new, head_dim=128, planned=True, pad=0), device)
    flash = flash_for(case.layer.config, case.q.dtype, case.q.device, caps_logits=False)
    warm_up(case.layer, case.q.shape[1], flash)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name) or False)
    attention(case.q, case.k, case.v, case.layer, case.step, 0.1)
    torch.cuda.synchronize()
    assert compiled == []
