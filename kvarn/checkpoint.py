"""What a checkpoint's configuration says about its cache. Imports neither torch nor an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.core.layers import LayerKind, count, layer_kinds, window_tokens
from kvarn.core.support import ModelFacts
from kvarn.core.windows import WindowShape
from kvarn.errors import KVarNError
from kvarn.presets import Preset

# Their attention layers have a learned logit each, of which the configuration says nothing.
_WITH_LEARNED_SINKS = ("gpt_oss",)
_RAW_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is cached of a model.

    Args:
        facts: what decides whether it can be served.
        layers: the kind of every layer.
        window: tokens that layers with a window attend to.
        kv_heads: kv heads of a layer, those of all ranks.
        raw_bytes: bytes of one number in the model's dtype.
    """

    facts: ModelFacts
    layers: tuple[LayerKind, ...]
    window: int
    kv_heads: int
    raw_bytes: int

    def heads_of_rank(self, ranks: int) -> int:
        """Return the kv heads that each of so many ranks caches; a latent is cached by all."""
        return 1 if self.facts.latent_dims else max(1, self.kv_heads // ranks)

    def shape(self, preset: Preset, ranks: int) -> CacheShape:
        """Return what each of so many ranks caches."""
        heads = self.heads_of_rank(ranks)
        return cache_shape(
            preset,
            layers=self.tile_layers,
            kv_heads=heads,
            head_dim=self.facts.head_dim,
            raw_bytes=self.raw_bytes,
            windows=self.windows(heads),
            latent_dims=self.facts.latent_dims,
        )

    @property
    def tile_layers(self) -> int:
        """Layers that hold tiles."""
        return count(self.layers, LayerKind.TILES)

    def windows(self, kv_heads: int) -> WindowShape | None:
        """Return what a rank with so many kv heads keeps in layers with a window; None if there are none."""
        layers = count(self.layers, LayerKind.MODEL_DTYPE)
        return WindowShape(layers, self.window, kv_heads, self.facts.head_dim, self.raw_bytes) if layers else None


def read_config(model: str) -> dict[str, Any]:
    """Return the configuration of a checkpoint folder, or of the name of a model on a hub.

    Raises:
        KVarNError: there is none.
    """
    path = Path(model) / "config.json"
    if not path.exists():
        path = _from_hub(model)
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise KVarNError(f"{path} is no JSON: {error}.") from error
    return config


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub has many kinds of errors, and may not be installed
        raise KVarNError(
            f"{model} is neither a folder with a config.json nor a model that a hub has ({type(error).__name__}); "
            "name a checkpoint folder."
        ) from error


def describe(config: Mapping[str, Any], dtype: str | None = None) -> Checkpoint:
    """Return what a configuration says.

    Args:
        config: as in config.json; the text part of a multimodal one counts.
        dtype: of the model, instead of the configuration's own.

    Raises:
        KVarNError: it is not that of a transformer, or the dtype has no known size.
    """
    text = {**config, **(config.get("text_config") or {})}
    try:
        heads, layers = int(text["num_attention_heads"]), layer_kinds(text)
        head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    except KeyError as error:
        raise KVarNError(f"The configuration has no {error.args[0]}: it is not that of a transformer.") from error
    latent = text.get("kv_lora_rank")
    dtype = dtype or text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    if dtype not in _RAW_BYTES:
        raise KVarNError(f"dtype {dtype!r} is not one of {', '.join(_RAW_BYTES)}; name one with --dtype.")
    facts = ModelFacts(
        architecture=(config.get("architectures") or ["?"])[0],
        dtype=dtype,
        head_dim=head_dim,
        v_head_dim=int(text.get("v_head_dim") or head_dim),
        latent_attention=latent is not None,
        encoder_decoder=bool(config.get("is_encoder_decoder")),
        latent_dims=(int(latent), int(text.get("qk_rope_head_dim") or 0)) if latent is not None else None,
        kinds=frozenset(layers),
        sparse_index=text.get("index_topk") is not None,
        learned_sinks=text.get("model_type") in _WITH_LEARNED_SINKS,
    )
    kv_heads = int(text.get("num_key_value_heads") or heads)
    return Checkpoint(facts, layers, window_tokens(text), kv_heads, _RAW_BYTES[dtype])
