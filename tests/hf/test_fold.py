"""Folding the values' rotation into weights, as benchmarks.quality.fold measures it, changes nothing but roundings."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_tile_cache import SMALL, make_model, prompt  # noqa: E402 (after the check)

from benchmarks.quality.fold import folded  # noqa: E402
from kvarn.core.hadamard import rotate  # noqa: E402


def qwen(attention):
    """A model with biases, and more than one kv head."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**SMALL, "num_key_value_heads": 3}, num_hidden_layers=2)
    model = transformers.Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.data.normal_()
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.mark.parametrize("make", [make_model, qwen])
def test_folded_model_gives_the_same_logits(make):
    with torch.no_grad():
        wanted = make("sdpa")(prompt()).logits
        found = folded(make("sdpa"), torch.float32)(prompt()).logits
    assert torch.allclose(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [make_model, qwen])
def test_values_come_rotated(make):
    model = make("sdpa")
    x = torch.randn(5, 192)
    with torch.no_grad():
        before = model.model.layers[1].self_attn.v_proj(x)
        after = folded(model, torch.float32).model.layers[1].self_attn.v_proj(x)
    assert torch.allclose(after.unflatten(1, (-1, 64)), rotate(before.unflatten(1, (-1, 64))), atol=1e-5)
