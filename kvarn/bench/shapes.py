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
_LEAST_VOCABULARY = 150000
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
        KVarNError: there is no tokenizer.json in that folder, or it has far fewer tokens than the model.
    """
    _check_tokenizer(tokenizer / "tokenizer.json")
    made = folder / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(config_of(SHAPES[name]), indent=1))
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
