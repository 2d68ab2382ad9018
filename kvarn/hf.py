"""KVarN in transformers, for evaluation and notebooks: a Cache over tiles, and the attention that reads it.

    model.set_attn_implementation(kvarn.hf.ATTENTION)
    cache = kvarn.hf.TileCache(model, "kvarn_k4v2_g128", max_tokens=4096)
    model.generate(ids, past_key_values=cache)

The same tiles, read rule and kernels as in a serving engine; pages are not shared, and nothing is scheduled. Layers
with a sliding window keep their rows in the model's dtype, and all of them, so that `resume` can go back to any tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvarn.checkpoint import Checkpoint, describe
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.core.chunk_step import chunk_step
from kvarn.core.layers import LayerKind
from kvarn.core.learned_sinks import sdpa_with_sinks
from kvarn.core.step import Step, decode_step
from kvarn.core.support import DeviceFacts, unsupported_reasons
from kvarn.core.tail import TailState
from kvarn.errors import CapacityError, UnsupportedConfig
from kvarn.presets import Preset, get_preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "kvarn"


class TileCache(Cache):
    """Cache of a model's K and V as tiles.

    Args:
        model: the model; its attention must be `ATTENTION`.
        preset: cache dtype.
        max_tokens: longest sequence; memory is allocated for it at once.
        batch: sequences, all of one length.

    Raises:
        UnknownPreset: there is no such preset.
        UnsupportedConfig: the model can't be served; lists every reason.
    """

    def __init__(
        self, model: PreTrainedModel, preset: str = "kvarn_k4v2_g128", max_tokens: int = 4096, batch: int = 1
    ) -> None:
        checkpoint = _served(model, get_preset(preset))
        shape = _shape(checkpoint, get_preset(preset))
        pages = -(-max_tokens // shape.preset.tile_tokens)
        self.config = CacheConfig.of(shape)
        self.max_tokens = max_tokens
        self.batch = batch
        dtype, device = model.dtype, model.device
        # Page 0 and ring 0 stay unused, as padding does in an engine.
        rings, blocks = batch + 1, batch * pages + 1
        self._state = TailState(self.config, rings, blocks, batch, device)
        self._rows = torch.arange(1, rings, dtype=torch.int32, device=device)
        self._block_table = torch.arange(1, blocks, dtype=torch.int32, device=device).view(batch, pages)
        self._group = model.config.get_text_config().num_attention_heads // shape.kv_heads
        self._step: Step | None = None
        self.length = 0
        layers: list[CacheLayerMixin] = [
            TileLayer(self, allocate_layer(self.config, blocks, rings, batch, dtype, device))
            if kind is LayerKind.TILES
            else WindowLayer()
            for kind in checkpoint.layers
        ]
        super().__init__(layers=layers)

    def begin(self, tokens: int) -> None:
        """Describe the forward pass that adds tokens to every sequence.

        Raises:
            CapacityError: the cache was made for shorter sequences.
        """
        end = self.length + tokens
        if end > self.max_tokens:
            raise CapacityError(f"The cache was made for {self.max_tokens} tokens, not {end}; raise max_tokens.")
        ends = torch.full_like(self._rows, end)
        if tokens == 1 and self.length:
            self._step = decode_step(self._state, self._rows, ends, self._block_table, self._group)
        else:
            starts = torch.full_like(self._rows, self.length)
            self._step, _ = chunk_step(
                self._state, self._rows, starts, ends, None, self._block_table, self._group, self.batch * tokens
            )
        self.length = end

    @property
    def step(self) -> Step:
        """The forward pass that is running."""
        assert self._step is not None
        return self._step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the rows on to the attention, which appends them; the first layer's begin a step.

        Args:
            key_states: [batch, kv_heads, tokens, head_dim]; value_states: the same.
            layer_idx: the layer.
        """
        if key_states.shape[0] != self.batch:
            raise ValueError(f"The cache was made for {self.batch} sequences, not {key_states.shape[0]}.")
        if layer_idx == 0:
            self.begin(key_states.shape[2])
        return self.layers[layer_idx].update(key_states, value_states)

    def resume(self) -> int:
        """Begin a new request that hits what is cached in whole tiles, as a conversation's next turn does in an engine.

        Returns:
            Tokens that are cached; feed those that follow.
        """
        dropped = self.length % self.config.tile_tokens
        self.length -= dropped
        self._state.forget(self._rows.long())
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.crop(-dropped)
        return self.length

    def reset(self) -> None:
        """Forget all sequences."""
        super().reset()
        self.length = 0
        self._state.forget(self._rows.long())

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refuse: sealed tiles belong to their sequences."""
        raise NotImplementedError("Beams can't be reordered in a tile cache; use num_beams=1.")


class TileLayer(CacheLayerMixin):
    """One layer of a TileCache."""

    def __init__(self, cache: TileCache, layer: LayerCache) -> None:
        super().__init__()
        self._cache = cache
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: memory was allocated with the cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows as they are, and with the keys where they belong."""
        key_states.cache_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    @property
    def step(self) -> Step:
        """The forward pass that is running."""
        return self._cache.step

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that a mask would cover."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens that are cached."""
        return self._cache.length

    def get_max_length(self) -> int:
        """Return the tokens that fit."""
        return self._cache.max_tokens

    def reset(self) -> None:
        """Do nothing: the cache forgets for all layers."""


class WindowLayer(DynamicLayer):
    """A layer of a TileCache that keeps rows as they are, because it reads its newest only."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows and return all, with the keys where they belong."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys.cache_layer = self
        return keys, values


def attend_tiles(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Append, seal and attend, as transformers asks an attention function to.

    Args:
        module: the attention layer.
        query: [batch, q_heads, tokens, head_dim].
        key: [batch, kv_heads, tokens, head_dim], from `TileCache.update`; value: the same.
        attention_mask: None, or that of the window.
        scaling: factor on q . k.
        softcap: soft cap of the logits.
        kwargs: others; ``s_aux``, [q_heads], are learned sinks.

    Returns:
        [batch, tokens, q_heads, head_dim], and no weights.

    Raises:
        NotImplementedError: there is no tile cache, or the layer asks for more than its kind can do.
    """
    layer, sinks = getattr(key, "cache_layer", None), kwargs.get("s_aux")
    if isinstance(layer, WindowLayer) and not softcap:
        if sinks is not None:
            options = {"is_causal": query.shape[2] > 1, "scale": scaling, "enable_gqa": True}
            out = sdpa_with_sinks(query, key, value, attention_mask, sink_logits=sinks, **options)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if not isinstance(layer, TileLayer) or kwargs.get("sliding_window") is not None:
        raise NotImplementedError(
            "The attention 'kvarn' needs a kvarn.hf.TileCache, attends to all of a tile layer's cache, and has no soft "
            "cap for layers with a window."
        )
    batch, q_heads, tokens, head_dim = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * tokens, x.shape[1], head_dim) for x in (query, key, value))
    scale = head_dim**-0.5 if scaling is None else scaling
    out = attention(q, k, v, layer.layer, layer.step, scale, softcap or 0.0, sink_logits=sinks)
    return out.view(batch, tokens, q_heads, head_dim), None


def window_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Return the mask of layers with a window; others need none. Refuse one that hides tokens.

    Raises:
        NotImplementedError: some token is masked out.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError("A tile cache holds sequences of one length without padding; run others apart.")
    if local_size is None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, local_size=local_size, **kwargs)
    return mask


def _served(model: PreTrainedModel, preset: Preset) -> Checkpoint:
    """Return what is cached of a model, or raise UnsupportedConfig."""
    checkpoint = describe(model.config.to_dict(), str(model.dtype).removeprefix("torch."))
    facts = replace(checkpoint.facts, architecture=type(model).__name__)
    capability = torch.cuda.get_device_capability(model.device) if model.device.type == "cuda" else None
    device = DeviceFacts(model.device.type, capability)
    reasons = unsupported_reasons(facts, preset, device, beside={LayerKind.MODEL_DTYPE})
    attention_now = model.config.get_text_config()._attn_implementation
    if attention_now != ATTENTION:
        reasons.append(f"The model's attention is {attention_now!r}; set_attn_implementation({ATTENTION!r}).")
    if reasons:
        raise UnsupportedConfig(reasons)
    return checkpoint


def _shape(checkpoint: Checkpoint, preset: Preset) -> CacheShape:
    return cache_shape(
        preset,
        layers=checkpoint.tile_layers,
        kv_heads=checkpoint.kv_heads,
        head_dim=checkpoint.facts.head_dim,
        raw_bytes=checkpoint.raw_bytes,
    )


AttentionInterface.register(ATTENTION, attend_tiles)
AttentionMaskInterface.register(ATTENTION, window_mask)
