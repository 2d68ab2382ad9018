"""The SGLang plugin inside the installed SGLang, without a server: hooks, signatures, resolution of real flags.

Everything runs in one other process, because importing SGLang takes seconds and hooks can't be taken back.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvarn.sglang_backend import compat_tables as tables

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
WINDOWS = {"head_dim": 64, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**DENSE, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **WINDOWS}
GPT_OSS = {**DENSE, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **WINDOWS}
QWEN_NEXT = {
    **DENSE,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "head_dim": 64,
    "full_attention_interval": 2,
}
DEEPSEEK = {
    **DENSE,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": None,
}
MODELS = {
    "dense": DENSE,
    "odd-head": {**DENSE, "head_dim": 80},
    "windows": GEMMA,
    "windows only": {**GEMMA, "layer_types": ["sliding_attention"] * 2},
    "windows and learned sinks": GPT_OSS,
    "states": QWEN_NEXT,
    "latents": DEEPSEEK,
}
KVARN = ("--kv-cache-dtype", "kvarn_k4v2_g128")
BAD_FLAGS = ("--page-size", "64", "--enable-hierarchical-cache", "--speculative-algorithm", "DFLASH", "--pp-size", "2")
# "dense" stands for the folder of that model.
DRAFT_MODEL = ("--speculative-draft-model-path", "dense")
FIVE_STEPS = ("--speculative-num-steps", "5", "--speculative-eagle-topk", "1")
NGRAMS = ("--speculative-algorithm", "ngram", "--speculative-ngram-max-bfs-breadth", "1")
TYPED_BACKEND = ("--speculative-draft-attention-backend", "triton")
CASES = {
    "auto": ("dense", ()),
    "unknown": ("dense", ("--kv-cache-dtype", "kvarn_k4v9_g128")),
    "bad flags": ("dense", (*KVARN, *BAD_FLAGS)),
    "bad flags and model": ("odd-head", (*KVARN, "--pp-size", "2")),
    "windows": ("windows", KVARN),
    "windows, afterwards": ("windows", ()),
    "windows in one pool": ("windows", (*KVARN, "--disable-hybrid-swa-memory")),
    "windows and trees of drafts": ("windows", (*KVARN, "--speculative-algorithm", "NGRAM")),
    "windows and n-grams": ("windows", (*KVARN, *NGRAMS)),
    "windows only": ("windows only", KVARN),
    "windows and learned sinks": ("windows and learned sinks", KVARN),
    "learned sinks, afterwards": ("windows and learned sinks", ("--attention-backend", "triton")),
    "states": ("states", (*KVARN, "--disable-radix-cache")),
    "states and hits": ("states", (*KVARN, "--mamba-track-interval", "100")),
    "latents": ("latents", KVARN),
    "latents and n-grams": ("latents", (*KVARN, *NGRAMS)),
    "kvarn": ("dense", KVARN),
    "eagle": ("dense", (*KVARN, "--speculative-algorithm", "EAGLE", *DRAFT_MODEL)),
    "mtp": ("dense", (*KVARN, "--speculative-algorithm", "NEXTN", *DRAFT_MODEL, *FIVE_STEPS)),
    "draft model": ("dense", (*KVARN, "--speculative-algorithm", "STANDALONE", *DRAFT_MODEL, *TYPED_BACKEND)),
    "n-grams": ("dense", (*KVARN, *NGRAMS)),
    "n-gram trees": ("dense", (*KVARN, "--speculative-algorithm", "NGRAM")),
    "deterministic": ("dense", (*KVARN, "--enable-deterministic-inference")),
    "deterministic in a fixed order": ("dense", (*KVARN, "--enable-deterministic-inference")),
    "as decided": ("dense", (*KVARN, "--page-size", "128", "--attention-backend", "kvarn")),
}
GRAPH_CALLS = (
    *("init_cuda_graph_state", "init_forward_metadata", "init_forward_metadata_out_graph"),
    *("init_forward_metadata_in_graph", "on_after_cuda_graph_warmup"),
)
SCRIPT = """
import json, os, sys
from types import SimpleNamespace
from kvarn.sglang_backend import compat, compat_hooks, plugin
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args
from kvarn.sglang_backend.layered import LayeredAttentionBackend
GRAPH_CALLS = json.loads(sys.argv[2])
plugin.register(); plugin.register(); HookRegistry.apply_hooks()
def resolve(folder, typed):
    try:
        args = prepare_server_args(["--model-path", folder, "--device", "cpu", "--skip-tokenizer-init", *typed])
        getattr(args, "resolve_once", lambda: None)()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    view = compat_hooks.flags_of(args)
    split = ModelConfig.from_server_args(args).is_hybrid_swa
    names = ("kv_cache_dtype", "attention_backend", "page_size", "disable_prefill_cuda_graph", "chunked_prefill_size")
    names += ("speculative_algorithm", "speculative_num_draft_tokens", "speculative_eagle_topk")
    names += ("speculative_draft_attention_backend", "disable_radix_cache")
    found = {name: getattr(view, name) for name in names}
    return {**found, "prefill": view.cuda_graph_config.prefill.backend, "split": split}
def state():
    hooks = {target: len(found) for target, found in HookRegistry._hooks.items()}
    return {"unapplied": len(compat._unapplied_hooks(compat.tables.ENGINE_TARGETS)), "hooks": hooks}
answers = {"installed": state()}
for name, (folder, typed) in json.loads(sys.argv[1]).items():
    fixed = str(int(name.endswith("in a fixed order")))
    os.environ.update(KVARN_CANONICAL=fixed, KVARN_BATCH_INVARIANT=fixed)
    answers[name] = resolve(folder, typed)
    answers[name]["state"] = state()
class Backend:
    def __init__(self):
        self.called = []
    def __getattr__(self, name):
        return lambda *_, **__: self.called.append(name)
tiles, windows = Backend(), Backend()
layered = LayeredAttentionBackend(tiles, windows)
for call in GRAPH_CALLS:
    getattr(layered, call)(*range(2 if call == "init_cuda_graph_state" else call.startswith("init")))
for window in (-1, 511):
    for call in ("forward_decode", "forward_extend"):
        getattr(layered, call)(None, None, None, SimpleNamespace(sliding_window_size=window), None)
answers["layered"] = [tiles.called, windows.called]
answers["differences"] = compat.differences(drafts=True)
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folders = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        folders[name] = str(folder)
    cases = {
        name: (folders[model], [folders.get(word, word) for word in typed]) for name, (model, typed) in CASES.items()
    }
    path = os.pathsep.join((str(REPOSITORY / "tools/sglang_cpu"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases), json.dumps(GRAPH_CALLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ANSWERS"))


def test_installed_sglang_has_the_signatures_of_the_table(answers):
    assert answers["differences"] == []


def test_registering_twice_hooks_once(answers):
    assert set(answers["installed"]["hooks"].values()) == {1}
    assert set(answers["kvarn"]["state"]["hooks"].values()) == {1}


def test_without_a_kvarn_dtype_no_memory_pool_is_hooked_and_no_flag_changes(answers):
    assert answers["installed"]["unapplied"] == answers["auto"]["state"]["unapplied"] == len(tables.ENGINE_TARGETS)
    assert not any("mem_cache" in target or "model_executor" in target for target in answers["auto"]["state"]["hooks"])
    assert answers["auto"]["attention_backend"] != "kvarn"
    assert answers["auto"]["page_size"] == 1


def test_refused_flags_hook_no_memory_pool(answers):
    assert answers["bad flags"]["state"]["unapplied"] == len(tables.ENGINE_TARGETS)


@pytest.mark.parametrize("case", ["kvarn", "as decided", "windows", "windows and learned sinks", "states", "latents"])
def test_everything_follows_from_the_dtype(answers, case):
    decided = answers[case]
    assert decided["attention_backend"] == "kvarn"
    assert decided["page_size"] == 128
    assert decided["disable_prefill_cuda_graph"] == (case == "latents")
    assert decided["prefill"] == "disabled"  # as it always is on a CPU
    assert decided["chunked_prefill_size"] % 128 == 0
    assert decided["state"]["unapplied"] == 0


@pytest.mark.parametrize(
    ("case", "algorithm", "verified", "backend"),
    [
        ("eagle", "EAGLE", 4, "intel_amx"),
        ("mtp", "EAGLE", 6, "intel_amx"),
        ("draft model", "STANDALONE", 4, "triton"),
        ("n-grams", "NGRAM", 12, None),
        ("windows and n-grams", "NGRAM", 12, None),
        ("latents and n-grams", "NGRAM", 12, None),
    ],
)
def test_drafts_are_one_chain_and_a_draft_model_keeps_an_attention_of_sglangs(
    answers, case, algorithm, verified, backend
):
    decided = answers[case]
    assert decided["attention_backend"] == "kvarn"
    assert decided["speculative_algorithm"] == algorithm
    assert decided["speculative_eagle_topk"] == 1
    assert decided["speculative_num_draft_tokens"] == verified
    assert decided["speculative_draft_attention_backend"] == backend


def test_trees_of_drafts_are_refused_with_what_to_do(answers):
    assert answers["n-gram trees"]["error"] == "UnsupportedConfig"
    assert "pass --speculative-ngram-max-bfs-breadth 1" in answers["n-gram trees"]["message"]


def test_deterministic_inference_is_served_where_the_order_is_fixed(answers):
    assert "KVARN_CANONICAL=1 and KVARN_BATCH_INVARIANT=1" in answers["deterministic"]["message"]
    decided = answers["deterministic in a fixed order"]
    assert decided["attention_backend"] == "kvarn"
    assert not decided["disable_radix_cache"]


def test_windows_get_their_pool_for_a_kvarn_dtype_only(answers):
    assert answers["windows"]["split"]
    assert not answers["windows, afterwards"]["split"]
    assert not answers["kvarn"]["split"]


def test_a_model_with_a_list_of_backends_keeps_sglangs_for_other_dtypes(answers):
    assert answers["learned sinks, afterwards"]["attention_backend"] == "triton"


def test_both_backends_are_told_of_every_step_and_each_layer_has_one(answers):
    tiles, windows = answers["layered"]
    assert tiles == windows == [*GRAPH_CALLS, "forward_decode", "forward_extend"]


def test_unknown_name_is_answered_by_kvarn_and_not_by_argparse(answers):
    assert answers["unknown"]["error"] == "UnknownPreset"
    assert "kvarn_k4v4_g128" in answers["unknown"]["message"]


def test_flags_of_the_real_parser_are_refused_all_at_once(answers):
    assert answers["bad flags"]["error"] == "UnsupportedConfig"
    message = answers["bad flags"]["message"]
    assert message.count("\n  - ") == 4
    for flag in BAD_FLAGS:
        assert flag in message


def test_flags_and_model_are_refused_in_one_message(answers):
    message = answers["bad flags and model"]["message"]
    assert "--pp-size 2" in message
    assert "head_dim 80" in message


@pytest.mark.parametrize(
    ("case", "sentences"),
    [
        ("windows in one pool", ["--disable-hybrid-swa-memory can't be used"]),
        ("windows and trees of drafts", ["--speculative-ngram-max-bfs-breadth 10 makes a tree of drafts"]),
        ("windows only", ["no layer that attends to the whole context"]),
        ("states and hits", ["--disable-radix-cache", "--mamba-track-interval 100 is not a multiple"]),
    ],
)
def test_mix_of_layers_is_refused_with_every_reason(answers, case, sentences):
    assert answers[case]["error"] == "UnsupportedConfig"
    for sentence in sentences:
        assert sentence in answers[case]["message"]
