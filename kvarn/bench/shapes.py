"""Shapes of models without weights: a checkpoint folder that engines fill with random numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from kvarn.errors import KVarNError

# What of a tokenizer's folder is not the tokenizer.
_NOT_TOKENIZER = ("config.json", "generation_config.json")
_TOKENIZER_ENDINGS = (".json", ".txt", ".jinja", ".model")
DUMMY_FLAGS = ("--load-format", "dummy")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Qwen3 model.

    Args:
        layers: layers.
        hidden: width of the residual stream.
        ffn: width of the MLP.
        heads: query heads.
        kv_heads: kv heads.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int = 8


SHAPES = {
    "qwen3-8b": ModelShape(layers=36, hidden=4096, ffn=12288, heads=32),
    "qwen3-32b": ModelShape(layers=64, hidden=5120, ffn=25600, heads=64),
}
_HEAD_DIM = 128
_VOCABULARY = 151936
# The longest context of a slope and its answer.
_POSITIONS = 129 * 1024


def config_of(shape: ModelShape) -> dict[str, object]:
    """Return the config.json of a shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": _VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": _POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def write_checkpoint(name: str, tokenizer: Path, folder: Path) -> Path:
    """Write a checkpoint folder without weights, to be loaded with `DUMMY_FLAGS`; return it.

    Args:
        name: one of `SHAPES`.
        tokenizer: folder whose tokenizer it gets.
        folder: where the checkpoint folder is made, under the shape's name.

    Raises:
        KVarNError: there is no tokenizer.json in that folder.
    """
    if not (tokenizer / "tokenizer.json").is_file():
        raise KVarNError(f"{tokenizer} has no tokenizer.json; name a folder that has one with --tokenizer.")
    made = folder / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(config_of(SHAPES[name]), indent=1))
    for path in sorted(tokenizer.iterdir()):
        if path.suffix in _TOKENIZER_ENDINGS and path.name not in _NOT_TOKENIZER and "safetensors" not in path.name:
            shutil.copyfile(path, made / path.name)
    return made
