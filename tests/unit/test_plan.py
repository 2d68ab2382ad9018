"""`kvarn plan`: what it predicts is what engines announced, and what it can't predict it refuses."""

import json
from pathlib import Path

import pytest

from kvarn.bench.shapes import SHAPES
from kvarn.checkpoint import describe
from kvarn.cli.main import main
from kvarn.core.capacity import CacheShape, latent_shape, plan_blocks, plan_capacity
from kvarn.core.support import DeviceFacts, unsupported_reasons
from kvarn.errors import KVarNError
from kvarn.presets import get_preset

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PRESET = get_preset("kvarn_k4v2_g128")
# The model that the engines served, and the longest request that vLLM was told.
SERVED = CacheShape(PRESET, layers=28, kv_heads=2, head_dim=128, raw_bytes=2, tail_tokens=128, sink_tokens=4)
VLLM_CONTEXT = 32768
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "hidden_size": 1536, "torch_dtype": "bfloat16", "sliding_window": 32768, "use_sliding_window": False,
}  # fmt: skip


def announced(engine: str) -> tuple[int, int]:
    """Tokens that an engine announced at the same memory: in the model's dtype and in KVarN's."""
    rows = json.loads((RESULTS / f"{engine}-h100.json").read_text())["rows"]
    by_dtype = {row["dtype"]: row["kv_tokens"] for row in rows}
    return by_dtype["float16"], by_dtype[PRESET.name]


def test_the_plan_is_within_a_percent_of_what_sglang_announced():
    raw, ours = announced("sglang")
    plan = plan_capacity(SERVED, raw * SERVED.raw_bytes_per_token, 64)
    assert plan.tokens == pytest.approx(ours, rel=0.01)


def test_the_plan_is_within_a_percent_of_what_vllm_announced():
    raw, ours = announced("vllm")
    requests = plan_blocks(SERVED, raw * SERVED.raw_bytes_per_token, VLLM_CONTEXT)
    assert requests * VLLM_CONTEXT == pytest.approx(ours, rel=0.01)


def test_what_a_configuration_says():
    found = describe(QWEN2)
    assert (found.tile_layers, found.kv_heads, found.facts.head_dim, found.raw_bytes) == (28, 2, 128, 2)
    assert not unsupported_reasons(found.facts, PRESET, DeviceFacts("cuda"))
    assert describe({"text_config": QWEN2}).kv_heads == 2
    assert describe(QWEN2 | {"model_type": "gpt_oss"}).facts.learned_sinks


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear-attention"),
        ({"layer_types": ["full_attention", "hybrid"]}, "something else"),
        ({"head_dim": 80}, "head_dim 80"),
        ({"v_head_dim": 64}, "V heads"),
    ],
)
def test_what_cannot_be_served_is_seen_in_the_configuration(change, word):
    (reason,) = unsupported_reasons(describe(QWEN2 | change).facts, PRESET, DeviceFacts("cuda"))
    assert word in reason


@pytest.mark.parametrize(
    ("config", "word"), [({}, "num_attention_heads"), (QWEN2 | {"torch_dtype": "int8"}, "'int8' is not one of")]
)
def test_a_configuration_that_says_too_little_is_an_error(config, word):
    with pytest.raises(KVarNError, match=word):
        describe(config)


def test_command_prints_every_preset(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert main(["plan", str(tmp_path), "--memory", "50", "--requests", "64", "--tensor-parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 kv heads a GPU" in said
    half = CacheShape(PRESET, layers=28, kv_heads=1, head_dim=128, raw_bytes=2, tail_tokens=128, sink_tokens=4)
    assert f"{plan_capacity(half, 50 << 30, 64).tokens:,}" in said
    assert f"{plan_blocks(half, 50 << 30, 32768):,}" in said


GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 18, "head_dim": 256,
    "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 640, "sliding_window": 512, "dtype": "bfloat16",
}  # fmt: skip


def test_layers_with_a_window_are_priced_at_their_own_size_and_have_no_tails():
    found = describe(GEMMA_3)
    assert (found.tile_layers, found.window) == (3, 512)
    windows = found.windows(1)
    assert windows.bytes_per_request(32768) == 15 * 512 * 2 * 256 * 2
    shape = CacheShape(PRESET, 3, 1, 256, 2, tail_tokens=128, sink_tokens=4, windows=windows)
    without = CacheShape(PRESET, 3, 1, 256, 2, tail_tokens=128, sink_tokens=4)
    assert shape.tail_bytes_per_request == without.tail_bytes_per_request == 3 * 256 * 2 * 256 * 2
    assert shape.fixed_bytes(7) - without.fixed_bytes(7) == 7 * windows.bytes_per_request(512)
    assert shape.raw_request_bytes(4096) == 3 * 4096 * 1024 + 15 * 512 * 1024


def test_command_shows_layers_by_kind(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_3))
    assert main(["plan", str(tmp_path), "--memory", "20"]) == 0
    said = capsys.readouterr().out
    assert "layers: 3 in tiles, 15 in model dtype" in said
    assert "keep the newest 512 tokens of each running request in bfloat16" in said


def test_command_plans_latents_where_they_are_served(tmp_path, capsys):
    config = QWEN2 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--memory", "40", "--requests", "64", "--tensor-parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "latents of 512 + 64" in said
    shape = latent_shape(PRESET, layers=28, latent_dim=512, rope_dim=64, raw_bytes=2)
    assert f"{plan_capacity(shape, 40 << 30, 64).tokens:,}" in said
    assert f"{plan_blocks(shape, 40 << 30, 32768) * 32768:,}" in said
    (tmp_path / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 300}))
    assert main(["plan", str(tmp_path), "--memory", "40"]) == 1
    assert "latents of 300" in capsys.readouterr().err


@pytest.mark.parametrize(("rope_bits", "sglang", "vllm"), [("16", 2.84, 2.80), ("8", 3.36, 3.27)])
def test_latents_of_a_real_model_hold_as_many_tokens_as_promised(rope_bits, sglang, vllm, monkeypatch):
    monkeypatch.setenv("KVARN_ROPE_BITS", rope_bits)
    shape, budget, context = describe(SHAPES["deepseek-v2-lite"]).shape(PRESET, 1), 40 << 30, 32768
    assert sglang <= plan_capacity(shape, budget, 64).ratio < sglang + 0.01
    assert vllm <= plan_blocks(shape, budget, context) * shape.raw_request_bytes(context) / budget < vllm + 0.01


def test_a_sparse_index_is_seen_in_the_configuration():
    facts = describe(QWEN2 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_topk": 2048}).facts
    assert any("sparse index" in reason for reason in unsupported_reasons(facts, PRESET, DeviceFacts("cuda")))


@pytest.mark.parametrize("arguments", [["no-such-folder", "--memory", "1"], [".", "--memory", "0"]])
def test_command_says_what_is_wrong(arguments, capsys, monkeypatch):
    # it may have been imported, and then no longer looks at its variable
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *arguments]) == 1
    assert capsys.readouterr().err.startswith("kvarn: ")
