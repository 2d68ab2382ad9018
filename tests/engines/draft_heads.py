"""Heads that draft for tiny models, made of the models' own layers, as checkpoints in use name their weights.

What a head of random layers drafts is wrong most of the time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# An EAGLE-3 head drafts every so manieth token of the vocabulary only.
_EVERY = 2


def save_eagle_head(model: Path, folder: Path) -> None:
    """Make an EAGLE head of a model's first layer, which takes the hidden state and lets the token alone."""
    folder.mkdir()
    config, weights = _load(model)
    del config["layer_types"]
    _save_config(folder, config | _like_llama("LlamaForCausalLMEagle"))
    head = {f"layers.0.{name}": x for name, x in _llama_layer(weights, 0).items() if "input_layernorm" not in name}
    width = config["hidden_size"]
    head["fc.weight"] = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)
    head["fc.bias"] = torch.zeros(width)
    save_file(head, folder / "model.safetensors")


def save_eagle3_head(model: Path, folder: Path, layers: tuple[int, int]) -> None:
    """Make an EAGLE-3 head of a model's last layer, which attends by the token's embedding and a hidden state.

    Args:
        model: folder of the model.
        folder: where the head goes.
        layers: what an engine calls the inputs of the model's first two layers, of which the head reads the second.
    """
    folder.mkdir()
    config, weights = _load(model)
    config.pop("layer_types", None)
    drafted = torch.arange(0, config["vocab_size"], _EVERY)
    read = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(layers)}
    _save_config(
        folder,
        config | _like_llama("LlamaForCausalLMEagle3") | {"draft_vocab_size": len(drafted), "eagle_config": read},
    )
    head = {f"midlayer.{name}": x for name, x in _llama_layer(weights, config["num_hidden_layers"] - 1).items()}
    for part in ("q", "k", "v"):
        name = f"midlayer.self_attn.{part}_proj.weight"
        head[name] = head[name].repeat(1, 2) / 2
    width = config["hidden_size"]
    head["midlayer.hidden_norm.weight"] = torch.ones(width)
    head["fc.weight"] = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)
    head["norm.weight"] = weights["model.norm.weight"]
    head["lm_head.weight"] = weights["lm_head.weight"][drafted].clone()
    # What is to be added to a draft's number.
    head["d2t"] = drafted - torch.arange(len(drafted))
    save_file(head, folder / "model.safetensors")


def save_with_mtp(model: Path, folder: Path) -> None:
    """Save a Qwen3-Next with a head for multi-token prediction, made of its last layer, which attends to all tokens."""
    folder.mkdir()
    config, weights = _load(model)
    _save_config(folder, config)
    width = config["hidden_size"]
    head = {f"mtp.layers.0.{name}": x for name, x in _layer(weights, config["num_hidden_layers"] - 1).items()}
    head["mtp.fc.weight"] = torch.cat([torch.eye(width), torch.eye(width)], dim=1).to(torch.bfloat16)
    head["mtp.norm.weight"] = weights["model.norm.weight"].clone()
    for name in ("embedding", "hidden"):
        head[f"mtp.pre_fc_norm_{name}.weight"] = torch.zeros(width, dtype=torch.bfloat16)
    save_file(weights | head, folder / "model.safetensors")


def save_mimo(model: Path, folder: Path) -> None:
    """Save a Llama as a MiMo, which adds nothing to its Q, K and V, with a head made of its last layer."""
    folder.mkdir()
    config, weights = _load(model)
    like_mimo = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    _save_config(folder, config | like_mimo)
    width = config["hidden_size"]
    prefix = "model.mtp_layers.0."
    head = {f"{prefix}{name}": x for name, x in _layer(weights, config["num_hidden_layers"] - 1).items()}
    head[f"{prefix}input_proj.weight"] = torch.cat([torch.eye(width), torch.eye(width)], dim=1)
    for name in ("token", "hidden", "final"):
        head[f"{prefix}{name}_layernorm.weight"] = torch.ones(width)
    weights |= head
    rows = {name: x.shape[0] for name, x in weights.items() if name.endswith(("q_proj.weight", "k_proj.weight"))}
    rows |= {name.replace("k_proj", "v_proj"): n for name, n in rows.items() if "k_proj" in name}
    biases = {name.replace("weight", "bias"): torch.zeros(n) for name, n in rows.items()}
    save_file(weights | biases, folder / "model.safetensors")


def _load(model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")


def _layer(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Return copies of a layer's weights by their names inside it."""
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): x.clone() for name, x in weights.items() if name.startswith(prefix)}


def _llama_layer(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Return a layer as Llama has it: without the norms of Q and K."""
    layer = _layer(weights, index)
    return {name: x for name, x in layer.items() if not name.endswith(("q_norm.weight", "k_norm.weight"))}


def _like_llama(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": "llama", "num_hidden_layers": 1}


def _save_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
