"""LatentTileBackend: vLLM's multi-head latent attention (MLA) over the tile cache.

vLLM stores a step's latents in one call and attends in others, so the rows of the first are kept for those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import MLAAttentionImpl

from kvarn import env
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import expanded_attention, latent_attention, latent_scratch_bytes
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.layout import LATENT_DIMS, ROPE_DIMS, LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.core.prefill_plan import LONG_ROWS
from kvarn.core.step import Step
from kvarn.vllm_backend import compat, resolution
from kvarn.vllm_backend.backend import TileAttentionBackend, backend_named
from kvarn.vllm_backend.metadata import TileMetadata, TileMetadataBuilder, describe
from kvarn.vllm_backend.tails import TailCache, add_tail, join_tail, prepare_for_tiles

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class LatentTileBackend(TileAttentionBackend):
    """What vLLM asks a backend before it makes layers and caches. There is a subclass for every preset."""

    @staticmethod
    def get_impl_cls() -> type[LatentTileAttention]:
        """Return the attention of one layer."""
        return LatentTileAttention

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """Return what describes a step."""
        return LatentMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        """Return that rows are latents."""
        return True

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the widths of rows, latent and rope part together, that have a layout."""
        return sorted({latent + rope for latent in LATENT_DIMS for rope in ROPE_DIMS})

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with a record's share as the bytes of a token."""
        if spec.state_content_bytes is not None:  # vLLM may ask twice
            return spec
        layout = LatentLayout.of_row(cls.preset, spec.head_size, env.rope_bits())
        return replace(spec, state_content_bytes=layout.record_bytes // layout.tile_tokens)


@dataclass
class LatentMetadata(TileMetadata):
    """A step, with what vLLM's own part of MLA asks.

    Requests of few rows come first and are attended to with absorbed weights. For those of long chunks, which come
    last, keys and values are made from latents.

    Args:
        num_decodes: requests of few rows.
        num_prefills: requests of many.
    """

    num_decodes: int = 0
    num_prefills: int = 0
    prefill: None = None

    @property
    def num_actual_tokens(self) -> int:
        """Rows of the step."""
        return self.num_tokens

    @property
    def num_decode_tokens(self) -> int:
        """Rows that are attended to with absorbed weights."""
        return self.num_tokens if self.plan is None else self.plan.short_tokens

    @property
    def decode(self) -> LatentMetadata:
        """The metadata of these rows."""
        return self


class LatentMetadataBuilder(TileMetadataBuilder):
    """Describes steps. No host sync."""

    # vLLM puts requests of no more rows first
    reorder_batch_threshold = LONG_ROWS

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        """Note what a step is."""
        step = LatentMetadata(**vars(super().build(common_prefix_len, common_attn_metadata, fast_build)))
        plan, requests = step.plan, common_attn_metadata.num_reqs
        if plan is not None and not plan.long_last:
            plan = step.plan = None
        step.num_decodes = requests if plan is None else plan.short_requests
        step.num_prefills = requests - step.num_decodes
        return step


class LatentTileAttention(MLAAttentionImpl[LatentMetadata]):
    """Attention of one layer over latent records, exact tails and sinks. The arguments are vLLM's.

    Raises:
        UnsupportedConfig: the configuration can't be served; lists every reason.
    """

    def __init__(
        self, *, num_heads: int, head_size: int, scale: float, kv_cache_dtype: str, attn_type: str,
        sliding_window: int | None = None, **mla: Any,
    ) -> None:  # fmt: skip
        fields = {
            "kv_cache_dtype": kv_cache_dtype,
            "head_size": head_size,
            "dtype": torch.get_default_dtype(),
            "use_mla": True,
            "use_sparse": mla.get("indexer") is not None,
            "attn_type": attn_type,
            "has_sliding_window": sliding_window is not None,
            "has_sink": mla.get("sinks") is not None,
        }
        config = get_current_vllm_config()
        prepare_for_tiles(config, resolution.reasons_against(fields, config, None))
        self.num_heads, self.head_size = num_heads, head_size
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype
        self.heads = ExpandedHeads(num_heads, mla["qk_head_dim"], mla["v_head_dim"])
        self._up_projection = mla["kv_b_proj"]
        self._index, self._is_described = 0, False
        self._rows: LatentRows | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find the layer's place in the model; the first layer also makes the companion of all. May be called again."""
        self._index, self._tail = join_tail(self, LatentTileBackend, act_dtype, _add_tail)

    def warm_up(self, tail: TailCache) -> None:
        """Compile what steps launch; the caches are bound."""
        warm_up_latents(tail.pool.layers[0], self.heads, tail.flash)

    def do_kv_cache_update(
        self, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor,
        kv_cache_dtype: str, k_scale: torch.Tensor, skip_scale: bool = False,
    ) -> None:  # fmt: skip
        """Keep a step's rows for the attention of the same layer, which follows and stores them."""
        del kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale
        self._rows, self._is_described = LatentRows(kv_c_normed, k_pe.flatten(1)), False

    def forward_mha(
        self, q: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata, k_scale: torch.Tensor, output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Append and seal all rows, and attend those of long chunks. `forward_mqa` follows, if the step has others.

        Args:
            q: [tokens, heads, key width].
            kv_c_normed: their latents, which `do_kv_cache_update` has seen.
            k_pe: their rope parts.
            kv_cache: the layer's blocks.
            attn_metadata: the step.
            k_scale: of vLLM's fp8.
            output: [tokens, heads * value width]; written.
            output_scale: of vLLM's fp8.
        """
        del kv_c_normed, k_pe, kv_cache, k_scale, output_scale
        layer, step = self._begin(attn_metadata)
        out = output.unflatten(1, (self.heads.count, self.heads.value_width))
        rows = self._rows_of(attn_metadata)
        expanded_attention(
            q, rows, layer, step, step.plan, self.heads, lambda x: self._up_projection(x)[0], self.scale, out
        )

    def forward_mqa(
        self, q: tuple[torch.Tensor, torch.Tensor], kv_cache: torch.Tensor, attn_metadata: LatentMetadata,
        layer: torch.nn.Module,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Append and seal all rows, and attend those of few rows. Graph-safe: yes for decode and verify steps.

        Args:
            q: absorbed queries [tokens, heads, latent_dim] and their rope parts [tokens, heads, rope_dim].
            kv_cache: the layer's blocks.
            attn_metadata: the step.
            layer: vLLM's layer.

        Returns:
            Mixed latents, [tokens, heads, latent_dim].
        """
        del kv_cache, layer
        tiles, step = self._begin(attn_metadata)
        return latent_attention(*q, self._rows_of(attn_metadata), tiles, step, self.scale), None

    def _begin(self, attn_metadata: LatentMetadata) -> tuple[LayerCache[LatentLayout], Step]:
        """Return the layer's cache and the core's description of a step, which the first layer makes once a step.

        Not once for the metadata: vLLM captures a graph with metadata that it has run a step with before.
        """
        tail: TailCache = self._tail
        pool = tail.pool
        if self._index == 0 and not self._is_described:
            self._is_described = True
            tail_blocks = compat.metadata_of(tail.layer_name).block_table
            layer = pool.layers[0]
            shape = latent_shape(layer.config.layout, self.num_heads, layer.records.device)
            attn_metadata.steps = describe(pool, attn_metadata, tail_blocks, *shape)
        return pool.layers[self._index], attn_metadata.steps[self._index // pool.rings_per_block]

    def _rows_of(self, attn_metadata: LatentMetadata) -> LatentRows:
        """Return the step's rows without what pads a graph."""
        return LatentRows(*(part[: attn_metadata.num_tokens] for part in self._rows))


def __getattr__(name: str) -> type[TileAttentionBackend]:
    """Return a preset's backend: vLLM finds backends by module and attribute."""
    return backend_named(name, LatentTileBackend)


def _add_tail(config: VllmConfig, layers: dict[str, Any], raw_dtype: torch.dtype) -> TailCache:
    """Make the companion of a model's attention layers and let vLLM allocate its cache."""
    layer = next(iter(layers.values()))
    heads = layer.impl.heads
    tail = add_tail(config, layers, raw_dtype, heads.key_width, latent_dims=compat.latent_dims(config))
    tail.token_numbers = heads.token_numbers(tail.shape.layout)
    needed = latent_scratch_bytes(
        CacheConfig.of(tail.shape),
        config.scheduler_config.max_num_batched_tokens,
        tail.max_requests,
        tail.max_pages,
        heads,
        tail.sinks,
        plans=tail.flash is not None,
    )
    compat.reserve_in_profile(layer, needed, raw_dtype)
    return tail
