"""core.support: every limit is told in one sentence of what, why and what to do, and all of them at once."""

import subprocess
import sys
from dataclasses import replace

import pytest

from kvarn.core.layers import LayerKind
from kvarn.core.layout import HEAD_DIMS
from kvarn.core.support import DeviceFacts, ModelFacts, unsupported_reasons
from kvarn.presets import PRESETS, get_preset

PRESET = get_preset("kvarn_k4v2_g128")
LLAMA = ModelFacts(architecture="LlamaForCausalLM", dtype="bfloat16", head_dim=128, v_head_dim=128)
H100 = DeviceFacts("cuda", (9, 0))
CPU = DeviceFacts("cpu")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("device", [H100, CPU], ids=["h100", "cpu"])
def test_dense_model_of_any_listed_head_dim_is_served(preset, head_dim, device):
    assert unsupported_reasons(replace(LLAMA, head_dim=head_dim, v_head_dim=head_dim), preset, device) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent_attention": True}, "MLA"),
        ({"encoder_decoder": True}, "encoder"),
        ({"kinds": frozenset({LayerKind.TILES, LayerKind.MODEL_DTYPE})}, "sliding-window"),
        ({"kinds": frozenset({LayerKind.TILES, LayerKind.RECURRENT})}, "Mamba"),
        ({"kinds": frozenset({LayerKind.TILES, LayerKind.UNKNOWN})}, "something else"),
        ({"kinds": frozenset({LayerKind.NO_CACHE})}, "no layer that attends to the whole context"),
        ({"sparse_index": True}, "sparse index"),
        ({"alibi": True}, "ALiBi"),
        ({"generates": False}, "does not generate"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim 80"),
        ({"v_head_dim": 64}, "64 wide"),
        ({"dtype": "float32"}, "float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_limit_of_a_model_gives_one_sentence_with_a_remedy(change, said):
    reasons = unsupported_reasons(replace(LLAMA, **change), PRESET, H100)
    assert len(reasons) == 1
    assert said in reasons[0]
    assert "--" in reasons[0]
    assert reasons[0].endswith(".")


def test_latent_head_widths_are_not_reported_beside_latent_attention():
    facts = replace(LLAMA, latent_attention=True, head_dim=576, v_head_dim=512)
    assert len(unsupported_reasons(facts, PRESET, H100)) == 1


def test_latents_are_served_where_the_engine_keeps_them_in_tiles_and_their_widths_have_a_layout():
    facts = replace(LLAMA, latent_attention=True, latent_dims=(512, 64), head_dim=192, v_head_dim=128)
    assert unsupported_reasons(facts, PRESET, H100, latents=True) == []
    assert len(unsupported_reasons(facts, PRESET, H100)) == 1
    for dims in ((300, 64), (512, 48)):
        (reason,) = unsupported_reasons(replace(facts, latent_dims=dims), PRESET, H100, latents=True)
        assert "latents of {} channels with rope parts of {}".format(*dims) in reason


def test_learned_sinks_are_served_but_for_latents():
    facts = replace(LLAMA, learned_sinks=True)
    assert unsupported_reasons(facts, PRESET, H100) == []
    latents = replace(facts, latent_attention=True, latent_dims=(512, 64))
    (reason,) = unsupported_reasons(latents, PRESET, H100, latents=True)
    assert "learned attention sinks" in reason


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (DeviceFacts("cuda", (7, 5)), "7.5"),
        (DeviceFacts("rocm"), "rocm"),
        (DeviceFacts("xpu"), "xpu"),
    ],
    ids=["turing", "rocm", "xpu"],
)
def test_device_without_kernels_is_refused(device, said):
    (reason,) = unsupported_reasons(LLAMA, PRESET, device)
    assert said in reason


def test_float32_is_served_on_a_cpu_only():
    facts = replace(LLAMA, dtype="float32")
    assert unsupported_reasons(facts, PRESET, CPU) == []
    assert unsupported_reasons(facts, PRESET, H100) != []


def test_all_reasons_are_collected():
    windows = frozenset({LayerKind.MODEL_DTYPE})
    facts = replace(LLAMA, kinds=windows, alibi=True, head_dim=80, v_head_dim=64, dtype="float32")
    assert len(unsupported_reasons(facts, PRESET, DeviceFacts("cuda", (7, 0)))) == 6


@pytest.mark.parametrize("kind", [LayerKind.MODEL_DTYPE, LayerKind.RECURRENT])
def test_layers_that_the_engine_keeps_beside_tiles_are_no_limit(kind):
    facts = replace(LLAMA, kinds=frozenset({LayerKind.TILES, LayerKind.NO_CACHE, kind}))
    assert unsupported_reasons(facts, PRESET, H100, beside={kind}) == []
    (reason,) = unsupported_reasons(replace(facts, kinds=frozenset({kind})), PRESET, H100, beside={kind})
    assert "no layer that attends to the whole context" in reason


def test_support_and_the_plugin_import_neither_torch_nor_an_engine():
    code = (
        "import sys, kvarn.core.support, kvarn.sglang_backend.plugin\n"
        "print([m for m in ('torch', 'sglang', 'vllm', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
