"""Layers with a sliding window beside layers in tiles: vLLM's own cache and attention, in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvarn.core.layers import LayerKind, layer_kinds
from kvarn.core.windows import PAGES, WindowShape
from kvarn.patching import wrap_once
from kvarn.presets import is_preset_name
from kvarn.vllm_backend.compat import tail_of
from kvarn.vllm_backend.compat_tables import SKIP_WINDOWS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def keep_windows_raw() -> None:
    """Exempt layers with a window from a kvarn dtype, as if that was typed, and let records decide what a block is.

    vLLM would raise the tokens of a block until its record is as large as its rows of a layer with a window. That is
    needed where all caches must have pages of one size, and ours needn't.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    for name, around in (("check_and_update_config", _exempt), ("update_block_size_for_backend", _size_blocks)):
        # A vLLM that lacks one is refused once a kvarn dtype is asked for.
        if hasattr(platform, name):
            wrap_once(platform, name, around)


def window_shape(vllm_config: VllmConfig) -> WindowShape | None:
    """Return what this rank keeps in layers with a window; None if there are none, or if they are not alike."""
    context = vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if getattr(layer, "sliding_window", None) is not None]
    shapes = {
        WindowShape(
            layers=len(layers),
            tokens=layer.sliding_window,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            raw_bytes=layer.kv_cache_torch_dtype.itemsize,
            pages=tuple(tokens for tokens in PAGES if _takes(layer.attn_backend, tokens)),
        )
        for layer in layers
    }
    return shapes.pop() if len(shapes) == 1 else None


def _takes(backend: type, tokens: int) -> bool:
    """Tell whether vLLM gives a backend's layers with a window pages of so many tokens."""
    from vllm.v1.attention.backend import MultipleOf

    sizes = backend.get_supported_kernel_block_sizes()
    return any(tokens % size.base == 0 if isinstance(size, MultipleOf) else tokens == size for size in sizes)


def _exempt(original: Callable[..., None], platform: type, vllm_config: VllmConfig) -> None:
    """Before vLLM checks a configuration. If no layer holds tiles, the first that asks for our backend is refused."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model is not None and is_preset_name(cache.cache_dtype):
        kinds = layer_kinds(model.hf_text_config)
        if LayerKind.TILES in kinds and LayerKind.MODEL_DTYPE in kinds:
            cache.kv_cache_dtype_skip_layers = sorted({*cache.kv_cache_dtype_skip_layers, SKIP_WINDOWS})
    original(platform, vllm_config)


def _size_blocks(original: Callable[..., None], platform: type, vllm_config: VllmConfig) -> None:
    """When weights are loaded and backends known: choose the tokens of a block, and of a page of a window."""
    cache = vllm_config.cache_config
    exempt, tail = cache.kv_cache_dtype_skip_layers, tail_of(vllm_config)
    if tail is None or not exempt:
        original(platform, vllm_config)
        return
    cache.kv_cache_dtype_skip_layers = []
    original(platform, vllm_config)
    cache.kv_cache_dtype_skip_layers = exempt
    if not cache.user_specified_block_size:
        cache.block_size = tail.shape.best_block_tokens(vllm_config.model_config.max_model_len, cache.block_size)
    cache.skip_page_size_padded = tail.shape.window_page_bytes(cache.block_size)
