"""Models whose layers are not all alike: where SGLang keeps each layer's cache, and which attention reads it.

SGLang has two pools that hold others: one for attention beside recurrent layers, whose states live elsewhere, and one
for attention over all tokens and over windows. In both, the pool of the layers that attend to all tokens is ours.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvarn.core.layers import LayerKind, layer_kinds, places
from kvarn.core.window_pool import WindowPool, scaled_ratio
from kvarn.core.windows import WindowShape
from kvarn.presets import is_preset_name
from kvarn.sglang_backend import compat_tables as tables

if TYPE_CHECKING:
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    from kvarn.core.capacity import CacheShape
    from kvarn.presets import Preset


def kinds_of(config: ModelConfig) -> frozenset[LayerKind]:
    """Return the kinds of layers that a model has."""
    kinds = set(layer_kinds(config.hf_text_config))
    if config.is_hybrid_swa or config.is_local_attention_model:
        kinds.add(LayerKind.MODEL_DTYPE)
    elif kinds == {LayerKind.MODEL_DTYPE} and not getattr(config.hf_text_config, "layer_types", None):
        # A window of all layers, which SGLang heeds for some models only: the loaded model says so.
        kinds = {LayerKind.TILES}
    if config.attention_arch.name == "SSM" or _hybrid_of(config) is not None:
        kinds.add(LayerKind.RECURRENT)
    return frozenset(kinds)


def kept_beside(config: ModelConfig) -> frozenset[LayerKind]:
    """Return the kinds of layers of a model that SGLang can keep beside tiles: of one kind only."""
    if kinds_of(config) >= tables.BESIDE_TILES:
        return frozenset()
    found = {LayerKind.MODEL_DTYPE: _split_of(config), LayerKind.RECURRENT: _hybrid_of(config)}
    return frozenset(kind for kind in tables.BESIDE_TILES if found[kind] is not None)


def layer_reasons(view: Any, config: ModelConfig, preset: Preset) -> list[str]:
    """Return why flags can't be served with a model whose layers are not all alike, one sentence each.

    Args:
        view: the flags before SGLang has adjusted them to the model.
        config: the model.
        preset: the preset asked for.
    """
    has_windows, has_states = _split_of(config) is not None, _hybrid_of(config) is not None
    reasons = _state_reasons(view, config, preset) if has_states else []
    if has_windows and view.disable_hybrid_swa_memory:
        reasons.append(
            "--disable-hybrid-swa-memory can't be used, because layers with a sliding window would keep K and V of "
            "all tokens beside the tiles; leave it out."
        )
    if has_windows and _architecture_of(config) in tables.SPLIT_BY_US and config.is_multimodal:
        reasons.append(
            "--enable-multimodal can't be used, because the model attends to an image's tokens in both directions, "
            "and KVarN only backwards; leave it out."
        )
    if (has_windows or has_states or config.attention_arch.name == "MLA") and view.speculative_algorithm is not None:
        reasons.append(
            f"--speculative-algorithm {view.speculative_algorithm} can't be used with a model that has windows, "
            "recurrent layers or latents (MLA), because that has not been tested with tiles; leave it out."
        )
    return reasons


def _state_reasons(view: Any, config: ModelConfig, preset: Preset) -> list[str]:
    if view.disable_radix_cache:
        return []
    name, tile = _architecture_of(config), preset.tile_tokens
    reasons = []
    if view.mamba_radix_cache_strategy == "no_buffer" or not _keeps_states_by_page(view, config):
        reasons.append(
            f"SGLang's prefix cache keeps the states of {name} for pages of one token only (strategy no_buffer) on "
            f"this device, and {preset.name} has pages of {tile}; leave out --mamba-radix-cache-strategy, or pass "
            "--disable-radix-cache."
        )
    if view.mamba_track_interval % tile:
        reasons.append(
            f"--mamba-track-interval {view.mamba_track_interval} is not a multiple of the page of {tile} tokens; "
            "leave it out."
        )
    return reasons


def _keeps_states_by_page(view: Any, config: ModelConfig) -> bool:
    """Tell whether the prefix cache keeps recurrent states at page ends."""
    from sglang.srt.arg_groups.overrides import supports_mamba_cache_extra_buffer as supports

    by_name = "model_arch" in inspect.signature(supports).parameters
    model = _architecture_of(config) if by_name else config.hf_config
    return view.device != "cpu" and bool(supports(view, model))


def split_windows(config: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``ModelConfig.from_server_args``: give windows a pool of their own where SGLang does not."""
    split = _split_of(config)
    if split is not None and is_preset_name(server_args.kv_cache_dtype) and not config.is_draft_model:
        # The second is asked for wherever the first is true.
        config.is_hybrid_swa, config.is_deepseek_v4_arch = True, False
        config.swa_attention_layer_ids, config.full_attention_layer_ids = map(list, split)


def tile_pool_of(pool: Any) -> Any:
    """Return the TilePool, which may stand inside one of SGLang's pools."""
    return getattr(pool, "full_kv_pool", pool)


def layer_ids(configurator: KVCacheConfigurator) -> list[int]:
    """Return the ids of the layers that hold tiles, in the order of the TilePool's layers."""
    config = configurator.model_config
    split, hybrid = _split_of(config), _hybrid_of(config)
    if split is not None:
        return split[1]
    if hybrid is not None:
        return list(hybrid.full_attention_layer_ids)
    # A model may run its layers several times, with a cache for each time.
    return list(range(configurator.layer_info.num_effective_layers))


def window_pool(configurator: KVCacheConfigurator, shape: CacheShape) -> WindowPool | None:
    """Return how windows are kept beside tiles; None if the model has none."""
    config = configurator.model_config
    split = _split_of(config)
    if split is None:
        return None
    from sglang.srt.runtime_context import get_parallel, get_schedule

    schedule = get_schedule()
    ratio = schedule.swa_full_tokens_ratio
    typed = getattr(schedule, "_swa_full_tokens_ratio_explicitly_set", ratio != tables.WINDOW_RATIO)
    # Where a number of tokens was typed, memory is not what limits the pools.
    if not typed and schedule.max_total_tokens is None:
        ratio = scaled_ratio(shape, ratio)
    windows = WindowShape(
        layers=len(split[0]),
        tokens=int(configurator.sliding_window_size or 0),
        kv_heads=config.get_swa_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=(config.swa_head_dim + config.swa_v_head_dim) // 2,
        raw_bytes=configurator.model_dtype.itemsize,
    )
    return WindowPool(shape, windows, ratio)


def price_windows(sizes: Any, pool: WindowPool) -> None:
    """Tell SGLang's HybridSWAPoolConfigurator what a token costs in each pool, and how many tokens windows get."""
    sizes._full_per_token = pool.shape.bytes_per_token // sizes._full_layers_num
    sizes._swa_per_token = pool.windows.token_bytes
    sizes._swa_full_tokens_ratio = pool.ratio
    sizes._cell_size = pool.bytes_of_both


def state_limit(configurator: KVCacheConfigurator) -> int | None:
    """Return how many requests' recurrent states there is room for; None if the model has none."""
    if configurator.mambaish_config is None:
        return None
    from sglang.srt.runtime_context import get_schedule

    return max(1, get_schedule().max_mamba_cache_size // configurator._calculate_mamba_ratio())


def build_pools(configurator: Any, tile_pool: type, sizes: Any, request_table: Any) -> Any:
    """Build the pool, or pools, through SGLang's own constructor calls, our class in place of its own."""
    if configurator.is_hybrid_swa:
        return configurator._build_hybrid_swa_kv_pool(
            full_max_total_num_tokens=sizes.full_max_total_num_tokens,
            swa_max_total_num_tokens=sizes.swa_max_total_num_tokens,
            mha_pool_class=_pool_factory(tile_pool, configurator.model_dtype),
        )
    tokens = sizes.max_total_num_tokens
    if configurator.mambaish_config is None:
        return configurator._build_mha_kv_pool(max_total_num_tokens=tokens, mha_pool_class=tile_pool)
    build = configurator._build_hybrid_linear_kv_pool
    # From 0.5.23 on it takes classes for latent caches too, which no model has that is served.
    classes = {name: tile_pool for name in inspect.signature(build).parameters if name.endswith("_pool_class")}
    return build(max_total_num_tokens=tokens, req_to_token_pool=request_table, **classes)


def window_backend(runner: Any) -> Any:
    """Return SGLang's own attention for layers with a window; None if the model has none."""
    split = _split_of(runner.model_config)
    if split is None:
        return None
    if runner.device == "cpu":
        return _native_window_backend(runner)
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    # It asks the pool's first layer for the width of its values, and that layer may hold tiles.
    pool = runner.token_to_kv_pool
    first, pool.start_layer = pool.start_layer, split[0][0]
    try:
        return TritonAttnBackend(runner)
    finally:
        pool.start_layer = first


def _pool_factory(tile_pool: type, raw_dtype: torch.dtype) -> Any:
    """Return what SGLang calls in place of a pool class, once for each of its two pools."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    def make_pool(*args: Any, allocation_label: str, dtype: torch.dtype, **kwargs: Any) -> Any:
        if allocation_label == tables.WINDOW_POOL_LABEL:
            return MHATokenToKVPool(*args, allocation_label=allocation_label, dtype=raw_dtype, **kwargs)
        return tile_pool(*args, allocation_label=allocation_label, dtype=dtype, **kwargs)

    return make_pool


def _native_window_backend(runner: Any) -> Any:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class NativeWindowBackend(TorchNativeAttnBackend):
        """SGLang's reads the pool of windows at slots of the other pool; this one translates them."""

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(runner.req_to_token_pool.req_to_token)
            self.req_to_token_pool = SimpleNamespace(req_to_token=slots)

    return NativeWindowBackend(runner)


def _architecture_of(config: ModelConfig) -> str:
    return (config.hf_config.architectures or [""])[0]


def _hybrid_of(config: ModelConfig) -> Any:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(config)


def _split_of(config: ModelConfig) -> tuple[list[int], list[int]] | None:
    """Return ids of layers with a window, and of the others, if SGLang can keep them in two pools; else None."""
    name = _architecture_of(config)
    if name in tables.OWN_BACKENDS_ONLY:
        return None
    windows = getattr(config, "swa_attention_layer_ids", None)
    if config.is_hybrid_swa and windows is not None:
        return list(windows), list(config.full_attention_layer_ids)
    if name not in tables.SPLIT_BY_US:
        return None
    kinds = layer_kinds(config.hf_text_config)
    windows = places(kinds, LayerKind.MODEL_DTYPE)
    return (windows, places(kinds, LayerKind.TILES)) if windows else None
