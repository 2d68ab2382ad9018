"""The vLLM versions that KVarN was tested with, and the private names that it relies on."""

from types import MappingProxyType
from typing import Final

from kvarn.core.layers import LayerKind

TESTED_VERSIONS: Final = ("0.32.0", "0.33.0")
RECOMMENDED_VERSION: Final = "0.33.0"

# Kinds of layers that vLLM caches by itself beside those in tiles.
BESIDE_TILES: Final = frozenset({LayerKind.MODEL_DTYPE, LayerKind.RECURRENT})

BACKEND_NAME: Final = "KVARN"
BACKEND_CLASS: Final = "TileAttentionBackend"
BACKEND_MODULE: Final = "kvarn.vllm_backend.backend"
# Registered beside the first attention layer, under its name and this suffix.
TAIL_SUFFIX: Final = ".kvarn_tail"

# What --kv-cache-dtype-skip-layers calls layers with a window.
SKIP_WINDOWS: Final = "sliding_window"

# Both of vLLM's model runners, for either of which a request's first step must be seen.
RUNNERS: Final = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
RUNNER_CLASS: Final = "GPUModelRunner"

# A function must take every parameter listed, and may take others only if they have a default.
SIGNATURES: Final = MappingProxyType(
    {
        "vllm.v1.attention.backend.AttentionMetadataBuilder.__init__": (
            *("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        ),
        "vllm.v1.attention.backend.AttentionMetadataBuilder.build": (
            *("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        ),
        "vllm.v1.attention.backend.AttentionBackend.customize_spec": ("spec",),
        "vllm.v1.attention.backend.AttentionImplBase.process_weights_after_loading": ("self", "act_dtype"),
        "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase.bind_kv_cache": ("self", "kv_cache"),
        "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase.get_kv_cache_spec": (
            *("self", "vllm_config"),
        ),
        "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry.register": (
            *("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
        ),
        "vllm.v1.core.single_type_kv_cache_manager.CircularBufferManager.get_num_blocks_to_allocate": (
            *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"),
            *("num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap", "prefill_end"),
        ),
        "vllm.v1.core.single_type_kv_cache_manager.CircularBufferManager.allocate_new_blocks": (
            *("self", "request_id", "num_tokens", "num_tokens_main_model"),
        ),
        "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": ("self",),
        "vllm.platforms.interface.Platform.check_and_update_config": ("vllm_config",),
        "vllm.platforms.interface.Platform.update_block_size_for_backend": ("vllm_config",),
        "vllm.v1.attention.backends.registry.register_backend": ("backend", "class_path", "is_mamba"),
    }
)

BATCH_INVARIANT: Final = "use_batch_invariant"
# Flags of the attention selector that ask for something, and what it is.
SELECTOR_FLAGS: Final = MappingProxyType(
    {
        "use_sparse": "chooses its tokens through a sparse index",
        "use_mm_prefix": "attends in both directions inside multimodal prefixes",
        "use_per_head_quant_scales": "brings fp8 scales per head",
        "use_non_causal": "attends without a causal mask",
        "use_rswa": "uses reference sliding-window attention",
        BATCH_INVARIANT: "asks for batch invariance (VLLM_BATCH_INVARIANT), which KVARN_CANONICAL=1 and "
        "KVARN_BATCH_INVARIANT=1 give",
        "use_kv_connector": "moves the cache through a KV connector, which would move records but not exact tails",
        "use_pcp": "splits prefills over ranks (PCP)",
        "use_dcp": "splits the cache over ranks (DCP)",
        "use_adaptive_verification": "decides query lengths on the device (adaptive verification)",
    }
)
