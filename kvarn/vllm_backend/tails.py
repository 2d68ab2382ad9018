"""TailCache: the companion layer that owns what a model's attention layers share, and makes their caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from kvarn.core.block_pool import BlockPool, allocate_sinks
from kvarn.core.cache import CacheConfig
from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.core.flash import FlashAttention, flash_for
from kvarn.core.layers import layer_kinds, summary
from kvarn.errors import UnsupportedConfig
from kvarn.vllm_backend import compat, compat_cpu, compat_tables, compat_windows
from kvarn.vllm_backend.spec import TailSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import CommonAttentionMetadata

# More requests than this hardly start new prompts at the same time.
_REQUESTS_WITH_SINKS = 128


class TailMetadata(AttentionMetadata):
    """The tail blocks of a step's requests, [requests, blocks_per_request], int32."""

    def __init__(self, block_table: torch.Tensor) -> None:
        self.block_table = block_table


class TailMetadataBuilder(AttentionMetadataBuilder[TailMetadata]):
    """Hands the block table on. Graph-safe: yes."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: object) -> None:
        super().__init__(*args)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TailMetadata:
        """Return the tail blocks of the step's requests."""
        del common_prefix_len, fast_build
        return TailMetadata(common_attn_metadata.block_table_tensor)


class TailBackend(AttentionBackend):
    """What vLLM asks a cache layer for. No attention is computed by it."""

    @staticmethod
    def get_name() -> str:
        """Return the name in logs."""
        return "KVARN_TAIL"

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Return that it computes nothing that could depend on the batch."""
        return True

    @staticmethod
    def get_builder_cls() -> type[TailMetadataBuilder]:
        """Return the builder of the block table."""
        return TailMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type:
        """Refuse: the attention layers do the work."""
        raise NotImplementedError("KVARN_TAIL holds tails for other layers and computes nothing.")


def forget_rings(tail: TailCache, blocks: list[int]) -> None:
    """Note that tail blocks went to new requests: what was written to them before is nobody's.

    Without this a ring's state could outlive its memory, which vLLM may have used for records in between.
    """
    if blocks:
        rows = torch.tensor(blocks, pin_memory=tail.kv_cache.is_cuda)
        tail.pool.state.forget(rows.to(tail.kv_cache.device, non_blocking=True))


class TailCache(torch.nn.Module, AttentionLayerBase):
    """Companion of a model's attention layers: its cache holds the rings, itself the sinks and the state.

    Args:
        name: its name among vLLM's layers.
        layers: the attention layers, in the model's order.
        shape: what this rank caches.
        raw_dtype: dtype of tails and sinks.
        max_requests: requests that may run at once.
        max_tokens: tokens that a request may have.
        device: where the model is.
    """

    def __init__(
        self,
        name: str,
        layers: list[Attention],
        shape: CacheShape,
        raw_dtype: torch.dtype,
        max_requests: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.shape = shape
        self.raw_dtype = raw_dtype
        self.max_requests = max_requests
        self.max_pages = -(-max_tokens // shape.preset.tile_tokens)
        self.kv_cache = torch.empty(0)
        self.flash: FlashAttention | None = None  # what attends long chunks, if anything does
        self.kinds = ""  # layers by kind, for the log
        self.token_numbers: int | None = None  # what a cached token takes when it is restored, if not a raw row
        # Plain attributes: the attention layers are modules of the model, not of this one.
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "_pool", None)
        self._announced = False
        slots = shape.sink_slots(min(max_requests, _REQUESTS_WITH_SINKS))
        # Taken before vLLM measures what is left for the cache, so that it is charged.
        self.sinks = allocate_sinks(shape, slots, raw_dtype, device)

    def get_attn_backend(self) -> type[TailBackend]:
        """Return the backend that hands out the tail's block table."""
        return TailBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> TailSpec:
        """Return how many bytes a block of rings has and how many blocks a request needs."""
        block_size = vllm_config.cache_config.block_size
        tiles = block_size // self.shape.preset.tile_tokens
        page_bytes = self.shape.rings_per_block(tiles) * self.shape.ring_bytes
        return TailSpec(
            # That of the records: another would coarsen prefix hits to a common multiple.
            block_size=block_size,
            num_kv_heads=1,
            head_size=self.shape.head_dim,
            # As the records', or vLLM would take the cache for one of mixed precision and clear every new block.
            dtype=torch.uint8,
            # rounded up: rings may be no multiple of a block's tokens
            state_content_bytes=-(-page_bytes // block_size),
            blocks_per_request=self.shape.tail_blocks(tiles),
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the memory of the rings; caches made over an earlier one are dropped."""
        self.kv_cache = kv_cache
        object.__setattr__(self, "_pool", None)

    @property
    def is_bound(self) -> bool:
        """Whether vLLM has allocated the cache."""
        return self.kv_cache.numel() > 0

    @property
    def pool(self) -> BlockPool:
        """The caches of all layers; made when first asked for, with every layer's memory bound."""
        if self._pool is None:
            object.__setattr__(self, "_pool", self._make_pool())
        return self._pool

    def warm_up(self) -> None:
        """Compile what steps launch; the caches are bound."""
        self.layers[0].impl.warm_up(self)

    def _make_pool(self) -> BlockPool:
        pool = BlockPool(self.shape, [layer.kv_cache for layer in self.layers], self.kv_cache, self.sinks)
        if not self._announced:
            # not before: vLLM settles the size of a block after the weights are loaded
            blocks = self.shape.tail_blocks(pool.config.tiles_per_block)
            compat.announce(self.shape, self.kinds, self.raw_dtype, blocks)
            self._announced = True
        return pool


def join_tail(
    impl: object, backend: type, raw_dtype: torch.dtype, make: Callable[..., TailCache]
) -> tuple[int, TailCache]:
    """Return a layer's place among a model's layers of its backend, and their companion, which `make` makes once."""
    config = get_current_vllm_config()
    layers = compat.layers_with(config, backend)
    index = next(i for i, layer in enumerate(layers.values()) if layer.impl is impl)
    return index, compat.tail_of(config) or make(config, layers, raw_dtype)


def add_tail(
    config: VllmConfig,
    layers: dict[str, Any],
    raw_dtype: torch.dtype,
    key_width: int,
    *,
    caps_logits: bool = False,
    latent_dims: tuple[int, int] | None = None,
) -> TailCache:
    """Make the companion of a model's attention layers and let vLLM allocate its cache.

    Args:
        config: vLLM's configuration.
        layers: the attention layers by name, in the model's order.
        raw_dtype: dtype of the model.
        key_width: channels of a head's keys, as long chunks attend to them.
        caps_logits: some layer has a soft cap.
        latent_dims: channels of the latents and of their rope parts; None if there are none.
    """
    layer = next(iter(layers.values()))
    shape = cache_shape(
        layer.attn_backend.preset,
        layers=len(layers),
        kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
        raw_bytes=raw_dtype.itemsize,
        draft_tokens=compat.draft_tokens(config),
        windows=compat_windows.window_shape(config),
        latent_dims=latent_dims,
    )
    tail = TailCache(
        next(iter(layers)) + compat_tables.TAIL_SUFFIX,
        list(layers.values()),
        shape,
        raw_dtype,
        config.scheduler_config.max_num_seqs,
        config.model_config.max_model_len,
        config.device_config.device,
    )
    device = tail.sinks.device
    engine = compat.flash_attention(device, key_width)
    tail.flash = flash_for(
        CacheConfig.of(shape), raw_dtype, device, caps_logits=caps_logits, engine=engine, head_dim=key_width
    )
    tail.kinds = summary(layer_kinds(config.model_config.hf_text_config))
    compat.add_layer(config, tail.layer_name, tail)
    return tail


def prepare_for_tiles(config: VllmConfig, reasons: list[str]) -> None:
    """Let vLLM serve a layer in tiles, while the layer is made.

    Args:
        config: vLLM's configuration.
        reasons: why it can't be served.

    Raises:
        UnsupportedConfig: there are reasons, or the tiles of another model.
    """
    if compat.tail_of(config) is not None:
        reasons = [
            *reasons,
            "A draft model's layers can't be cached in tiles, whose tails belong to the model's own layers; pass "
            "kv_cache_dtype auto in --speculative-config, or another draft model.",
        ]
    if reasons:
        raise UnsupportedConfig(reasons)
    compat.keep_drafts_raw(config)
    compat_cpu.stand_beside_ours()
    compat.watch_admissions(forget_rings)
    compat.before_warm_up(TailCache.warm_up)
