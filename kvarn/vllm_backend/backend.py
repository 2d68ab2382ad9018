"""TileAttentionBackend: vLLM's attention over the tile cache. Every method hands over to the core."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvarn import env
from kvarn.core.attention import attention, reserve_scratch
from kvarn.core.cache import CacheConfig
from kvarn.core.layout import HEAD_DIMS, TileLayout
from kvarn.core.warm_up import warm_up
from kvarn.errors import UnsupportedConfig
from kvarn.presets import PRESETS, Preset
from kvarn.vllm_backend import compat, compat_tables, resolution
from kvarn.vllm_backend.metadata import TileMetadata, TileMetadataBuilder, describe
from kvarn.vllm_backend.tails import TailCache, add_tail, join_tail, prepare_for_tiles

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


class TileAttentionBackend(AttentionBackend):
    """What vLLM asks a backend before it makes layers and caches.

    There is a subclass for every preset, an attribute of this module under the preset's name: vLLM asks classes, and
    remembers which one it chose for a kind of layer.
    """

    preset: ClassVar[Preset]
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = list(PRESETS)
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Return the name under which the backend is registered."""
        return compat_tables.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[TileAttention]:
        """Return the attention of one layer."""
        return TileAttention

    @staticmethod
    def get_builder_cls() -> type[TileMetadataBuilder]:
        """Return what describes a step."""
        return TileMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the head widths that have a tile layout."""
        return list(HEAD_DIMS)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        """Return that a block holds any number of tiles."""
        del kv_cache_spec
        return [MultipleOf(cls.preset.tile_tokens)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout in which a head's record is in one piece and groups of other page sizes share a pool."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with a record's share as the bytes of a token and head."""
        if spec.state_content_bytes is not None:  # vLLM may ask twice
            return spec
        layout = TileLayout.of(cls.preset, spec.head_size)
        return replace(spec, state_content_bytes=layout.record_bytes // layout.tile_tokens)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Return whether a row's result doesn't depend on the batch."""
        return env.order_is_fixed()

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return that records can't be moved without their tails."""
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        """Return that layers may have learned sinks."""
        return True

    @classmethod
    def validate_configuration(cls, device_capability: Any, **fields: Any) -> list[str]:
        """Return every reason why a layer can't be served, one sentence each."""
        return resolution.reasons_against(fields, get_current_vllm_config(), device_capability)


class TileAttention(AttentionImpl[TileMetadata]):
    """Attention of one layer over records, exact tails and sinks. The arguments are vLLM's.

    Raises:
        UnsupportedConfig: the configuration can't be served; lists every reason. Asked here too, because vLLM
            remembers the backend of a kind of layer when a process makes a second engine.
        NotImplementedError: the layer asks for more than causal self-attention over the whole context.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None, **extras: Any,
    ) -> None:  # fmt: skip
        self._sinks = extras.pop("sinks", None)
        fields = {
            "kv_cache_dtype": kv_cache_dtype,
            "head_size": head_size,
            "dtype": torch.get_default_dtype(),
            "use_mla": False,
            "attn_type": attn_type,
            "has_sliding_window": sliding_window is not None,
            "has_sink": self._sinks is not None,
        }
        config = get_current_vllm_config()
        prepare_for_tiles(config, resolution.reasons_against(fields, config, None))
        asked = [f"{name}={value!r}" for name, value in extras.items() if value]
        asked += ["ALiBi slopes"] * bool(alibi_slopes)
        asked += ["the cache of another layer"] * (kv_sharing_target_layer_name is not None)
        if asked:
            raise NotImplementedError(
                f"A layer asks for {', '.join(asked)}, which KVarN can't serve yet. "
                "Serve this model without a kvarn cache dtype."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._logit_cap = logits_soft_cap or 0.0
        self._index = 0

    @property
    def caps_logits(self) -> bool:
        """Whether the layer has a soft cap on its logits."""
        return self._logit_cap > 0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find the layer's place in the model; the first layer also makes the companion of all. May be called again."""
        self._index, self._tail = join_tail(self, TileAttentionBackend, act_dtype, _add_tail)

    def warm_up(self, tail: TailCache) -> None:
        """Compile what steps launch; the caches are bound."""
        warm_up(tail.pool.layers[0], self.num_heads, tail.flash, self._sinks)

    def forward(
        self, layer: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, attn_metadata: TileMetadata | None, output: torch.Tensor,
        output_scale: torch.Tensor | None = None, output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Append, seal and attend; rows of padding are left alone. Graph-safe: yes for decode and verify steps."""
        tail: TailCache = self._tail
        if attn_metadata is None:
            plans = tail.flash is not None
            reserve_scratch(query, CacheConfig.of(tail.shape), tail.max_requests, tail.max_pages, plans=plans)
            return output.fill_(0)
        pool = tail.pool
        if self._index == 0:
            tail_blocks = compat.metadata_of(tail.layer_name).block_table
            attn_metadata.steps = describe(pool, attn_metadata, tail_blocks, self.num_heads // self.num_kv_heads)
        step = attn_metadata.steps[self._index // pool.rings_per_block]
        rows = slice(0, attn_metadata.num_tokens)
        attention(
            query[rows],
            key[rows],
            value[rows],
            pool.layers[self._index],
            step,
            self.scale,
            self._logit_cap,
            output[rows],
            self._sinks,
        )
        return output


@functools.cache
def backend_named(name: str, kind: type[TileAttentionBackend]) -> type[TileAttentionBackend]:
    """Return the backend of one kind for layers that are cached with a preset: an attribute of the kind's module.

    Raises:
        AttributeError: no preset has that name.
    """
    if name not in PRESETS:
        raise AttributeError(f"module {kind.__module__!r} has no attribute {name!r}")
    return type(kind.__name__, (kind,), {"preset": PRESETS[name]})


def __getattr__(name: str) -> type[TileAttentionBackend]:
    """Return a preset's backend: vLLM finds backends by module and attribute."""
    return backend_named(name, TileAttentionBackend)


def _add_tail(config: VllmConfig, layers: dict[str, Any], raw_dtype: torch.dtype) -> TailCache:
    """Make the companion of a model's attention layers and let vLLM allocate its cache."""
    heads = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers.values()}
    if len(heads) > 1:
        raise UnsupportedConfig(
            [
                f"The model's layers differ in their K and V heads (number, width of K, width of V: {sorted(heads)}), "
                "which one pool of tiles can't hold; serve it with --kv-cache-dtype auto."
            ]
        )
    caps_logits = any(layer.impl.caps_logits for layer in layers.values())
    return add_tail(config, layers, raw_dtype, next(iter(heads))[1], caps_logits=caps_logits)
