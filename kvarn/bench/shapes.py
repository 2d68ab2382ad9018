"""Shapes of models without weights: a checkpoint folder that engines fill with random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kvarn.errors import KVarNError

# What of a tokenizer's folder is not the tokenizer.
_NOT_TOKENIZER = ("config.json", "generation_config.json")
_TOKENIZER_ENDINGS = (".json", ".txt", ".jinja", ".model")
DUMMY_FLAGS = ("--load-format", "dummy")
# Of Qwen's tokenizers, which every shape gets.
_VOCABULARY = 151936
_LEAST_VOCABULARY = 150000
# The longest context of a slope and its answer.
_POSITIONS = 129 * 1024
_COMMON = {
    "torch_dtype": "bfloat16",
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _POSITIONS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
}


def _qwen3(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, object]:
    return _COMMON | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
    }


def _deepseek_v2_lite() -> dict[str, object]:
    """Attention of DeepSeek-V2-Lite; all MLPs are its first layer's, as large as the experts that a token uses."""
    layers = 27
    return _COMMON | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    }


def _qwen3_next() -> dict[str, object]:
    """Attention and recurrent layers of Qwen3-Next-80B-A3B, with 16 of its 512 experts, so that it fits one GPU."""
    layers = 48
    return _COMMON | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_experts": 16,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
    }


SHAPES = {
    "qwen3-8b": _qwen3(layers=36, hidden=4096, ffn=12288, heads=32),
    "qwen3-32b": _qwen3(layers=64, hidden=5120, ffn=25600, heads=64),
    "deepseek-v2-lite": _deepseek_v2_lite(),
    "qwen3-next": _qwen3_next(),
}
"""By name: config.json."""


def write_checkpoint(name: str, tokenizer: Path, folder: Path) -> Path:
    """Write a checkpoint folder without weights, to be loaded with `DUMMY_FLAGS`; return it.

    Args:
        name: one of `SHAPES`.
        tokenizer: folder whose tokenizer it gets.
        folder: where the checkpoint folder is made, under the shape's name.

    Raises:
        KVarNError: there is no tokenizer.json in that folder, or it has far fewer tokens than the model.
    """
    _check_tokenizer(tokenizer / "tokenizer.json")
    made = folder / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    for path in sorted(tokenizer.iterdir()):
        if path.suffix in _TOKENIZER_ENDINGS and path.name not in _NOT_TOKENIZER and "safetensors" not in path.name:
            shutil.copyfile(path, made / path.name)
    return made


def _check_tokenizer(path: Path) -> None:
    if not path.is_file():
        raise KVarNError(f"{path.parent} has no {path.name}; name a folder that has one with --tokenizer.")
    tokens = len(json.loads(path.read_text())["model"]["vocab"])
    # Random weights answer with any token, and servers can't write one that the tokenizer lacks.
    if tokens < _LEAST_VOCABULARY:
        raise KVarNError(
            f"The tokenizer in {path.parent} has {tokens} tokens and the model {_VOCABULARY}, so that its answers "
            f"could not be written; name a folder with --tokenizer whose tokenizer has {_LEAST_VOCABULARY} or more, "
            "such as one of Qwen2.5 or Qwen3."
        )
