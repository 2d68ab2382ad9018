"""Which layers of a model hold tiles, which keep K and V in the model's dtype, and which keep no K and V.

Decided here for both engines, `kvarn plan` and transformers, from what a configuration says. Imports neither torch nor
an engine.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any


class LayerKind(enum.Enum):
    """How one layer's cache is kept. The value ends ``3 layers ...`` in messages."""

    TILES = "in tiles"
    # A sliding window or a chunk: few tokens a request, rewritten all the time.
    MODEL_DTYPE = "in model dtype"
    # Linear attention, Mamba, short convolutions: a state of one size, however long the request.
    RECURRENT = "with a recurrent state"
    NO_CACHE = "without a cache"
    # An index, a compressed context, attention and a state in one layer, another layer's cache.
    UNKNOWN = "of an unknown kind"


_OF_TYPE = {
    "full_attention": LayerKind.TILES,
    "attention": LayerKind.TILES,
    "sliding_attention": LayerKind.MODEL_DTYPE,
    "chunked_attention": LayerKind.MODEL_DTYPE,
    "linear_attention": LayerKind.RECURRENT,
    "mamba": LayerKind.RECURRENT,
    "conv": LayerKind.RECURRENT,
    "moe": LayerKind.NO_CACHE,
    "mlp": LayerKind.NO_CACHE,
}
# NemotronH's pattern, a letter a layer; EXAONE's, repeated, whose last layer attends to all.
_OF_LETTER = {
    "M": LayerKind.RECURRENT,
    "*": LayerKind.TILES,
    "-": LayerKind.NO_CACHE,
    "E": LayerKind.NO_CACHE,
    "L": LayerKind.MODEL_DTYPE,
    "G": LayerKind.TILES,
}
# Model types whose checkpoints may leave the period to transformers' default: every so many layers, one holds tiles.
_WINDOWS_OF = {
    "cohere2": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "gpt_oss": 2,
    "llama4_text": 4,
    "vaultgemma": 2,
}
_STATES_OF = {"qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4}


def layer_kinds(config: Mapping[str, Any] | object) -> tuple[LayerKind, ...]:
    """Return the kind of every layer of a model, in order.

    Args:
        config: text configuration of transformers, as an object, or as in config.json. In order of precedence: types
            of all layers, a pattern of letters, places of attention layers, a period, a window of every layer.
    """
    layers = int(_field(config, "num_hidden_layers") or 0)
    kinds = _from_types(config) or _from_letters(config, layers) or _from_places(config, layers)
    kinds = kinds or _from_period(config, layers) or _from_window(config, layers)
    shared = int(_field(config, "num_kv_shared_layers") or 0)
    return (*kinds[: len(kinds) - shared], *[LayerKind.UNKNOWN] * shared)


def window_tokens(config: Mapping[str, Any] | object) -> int:
    """Return the newest tokens that layers with a window or a chunk attend to; 0 if a configuration names none.

    Args:
        config: as for `layer_kinds`.
    """
    if _field(config, "use_sliding_window") is False:
        return 0
    return int(_field(config, "sliding_window") or _field(config, "attention_chunk_size") or 0)


def count(kinds: Sequence[LayerKind], kind: LayerKind) -> int:
    """Return how many layers are of a kind."""
    return sum(found is kind for found in kinds)


def places(kinds: Sequence[LayerKind], kind: LayerKind) -> list[int]:
    """Return which layers are of a kind."""
    return [place for place, found in enumerate(kinds) if found is kind]


def summary(kinds: Sequence[LayerKind]) -> str:
    """Return how many layers there are of each kind, for a message: ``3 in tiles, 15 in model dtype``."""
    found = ((kind.value, count(kinds, kind)) for kind in LayerKind)
    return ", ".join(f"{number} {name}" for name, number in found if number)


def _field(config: Mapping[str, Any] | object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _from_types(config: Mapping[str, Any] | object) -> tuple[LayerKind, ...]:
    types = _field(config, "layer_types") or _field(config, "layers_block_type") or ()
    return tuple(_OF_TYPE.get(name, LayerKind.UNKNOWN) for name in types)


def _from_letters(config: Mapping[str, Any] | object, layers: int) -> tuple[LayerKind, ...]:
    whole, repeated = _field(config, "hybrid_override_pattern"), _field(config, "sliding_window_pattern")
    if isinstance(whole, str):
        return tuple(_OF_LETTER.get(letter, LayerKind.UNKNOWN) for letter in whole)
    if not isinstance(repeated, str) or not window_tokens(config):
        return ()
    kinds = [_OF_LETTER.get(repeated[i % len(repeated)], LayerKind.UNKNOWN) for i in range(layers)]
    return (*kinds[:-1], LayerKind.TILES)


def _from_places(config: Mapping[str, Any] | object, layers: int) -> tuple[LayerKind, ...]:
    """Mamba models that say which layers have attention."""
    indices, period = _field(config, "attn_layer_indices"), _field(config, "attn_layer_period")
    if period:
        indices = range(int(_field(config, "attn_layer_offset") or 0), layers, int(period))
    if indices is None:
        return ()
    return tuple(LayerKind.TILES if i in indices else LayerKind.RECURRENT for i in range(layers))


def _from_period(config: Mapping[str, Any] | object, layers: int) -> tuple[LayerKind, ...]:
    """Every so many layers one attends to the whole context, the last of each round."""
    model_type = _field(config, "model_type")
    period = _field(config, "full_attention_interval") or _STATES_OF.get(model_type)
    others = LayerKind.RECURRENT
    if not period and window_tokens(config):
        stated = _field(config, "sliding_window_pattern") or _field(config, "_sliding_window_pattern")
        period, others = stated or _WINDOWS_OF.get(model_type), LayerKind.MODEL_DTYPE
    if not period:
        return ()
    return tuple(others if (i + 1) % int(period) else LayerKind.TILES for i in range(layers))


def _from_window(config: Mapping[str, Any] | object, layers: int) -> tuple[LayerKind, ...]:
    """All layers are alike, or from some layer on they have a window."""
    if not window_tokens(config):
        return (LayerKind.TILES,) * layers
    # Qwen2 and Qwen3 have windows above this layer, and only if they say that they use them.
    first = int(_field(config, "max_window_layers") or 0) if _field(config, "use_sliding_window") else 0
    return tuple(LayerKind.TILES if i < first else LayerKind.MODEL_DTYPE for i in range(layers))
