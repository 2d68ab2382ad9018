"""The SGLang versions that KVarN was tested with, and the private names and signatures that it relies on.

One row serves every tested version: a function must take every parameter listed, and may take others only if they
have a default. ``compat.differences`` compares the rows with the installed SGLang.
"""

from types import MappingProxyType
from typing import Final

from kvarn.core.layers import LayerKind

TESTED_VERSIONS: Final = ("0.5.17", "0.5.23")
RECOMMENDED_VERSION: Final = "0.5.23"
# Those in which drafts were tested, too.
DRAFT_VERSIONS: Final = ("0.5.23",)
# Those in which prefill in CUDA graphs was.
CHUNK_GRAPH_VERSIONS: Final = ("0.5.23",)

BACKEND_NAME: Final = "kvarn"
# Kinds of layers that are served beside those in tiles, though not both in one model.
BESIDE_TILES: Final = frozenset({LayerKind.MODEL_DTYPE, LayerKind.RECURRENT})
# SGLang's tokens of windows for one token of the other layers, if --swa-full-tokens-ratio is not typed.
WINDOW_RATIO: Final = 0.8

# --- hooked in every process that loads plugins; the modules are small and loaded anyway
ADD_CLI_ARGS: Final = "sglang.srt.server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS: Final = "sglang.srt.server_args.ServerArgs.from_cli_args"

# --- steps of argument resolution: before CUDA graphs, memory and backends are decided, and the last one
EARLY_STEP: Final = "handle_cuda_graph_config"
LATE_STEP: Final = "validate_deepep_v2_dispatch_token_budget"
# Where SGLang lets no backend but those of a list serve some models, and one that is in all lists.
MODEL_STEP: Final = "handle_model_specific_adjustments"
LISTED_BACKEND: Final = "triton"
LISTING_MODELS: Final = ("GptOssForCausalLM",)
# Before 0.5.18 the steps are methods, reached by ordinary hooks.
EARLY_METHOD: Final = "sglang.srt.server_args.ServerArgs._handle_cuda_graph_config"
LATE_METHOD: Final = "sglang.srt.server_args.ServerArgs._handle_model_capability_adjustments"
MODEL_METHOD: Final = "sglang.srt.server_args.ServerArgs._handle_model_specific_adjustments"

# --- hooked only where a kvarn dtype was asked for
CONFIGURE_DTYPE: Final = "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype"
PROFILE_BYTES: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes"
BUILD_POOL: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool"
CELL_SIZE: Final = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
PRICE_TOKEN: Final = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.__init__"
WINDOW_SIZES: Final = "sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__"
LAYER_SPLIT: Final = "sglang.srt.configs.model_config.ModelConfig.from_server_args"
ENGINE_TARGETS: Final = (
    *(CONFIGURE_DTYPE, PROFILE_BYTES, BUILD_POOL, CELL_SIZE, PRICE_TOKEN, WINDOW_SIZES, LAYER_SPLIT),
)
# --- hooked only where drafts come from n-grams
NGRAM_DRAFTS: Final = "sglang.srt.speculative.cpp_ngram.ngram_corpus.NgramCorpus.batch_get"

# What SGLang attends with on a CPU.
CPU_BACKEND: Final = "intel_amx"
FLASH_BACKEND: Final = "fa3"

# A process that has loaded this runs a model, or launches one that does; hooks cost it no import that it could avoid.
ENGINE_MODULE: Final = "sglang.srt.managers.scheduler"

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_POOLS = "sglang.srt.mem_cache.memory_pool"
_ATTENTION = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_ATTEND = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")

SIGNATURES: Final = MappingProxyType(
    {
        CONFIGURE_DTYPE: (
            *("server_args_kv_cache_dtype", "model", "model_dtype", "is_draft_worker", "is_dflash"),
            "speculative_draft_attention_backend",
        ),
        PROFILE_BYTES: ("self", "pre_model_load_memory"),
        BUILD_POOL: ("self", "sizes", "is_dsa_model", "is_dsv4_model", "req_to_token_pool"),
        CELL_SIZE: ("self", "kvc", "num_layers"),
        PRICE_TOKEN: ("self", "kvc"),
        WINDOW_SIZES: ("self", "kvc"),
        LAYER_SPLIT: ("server_args", "is_draft_model"),
        f"{_CONFIGURATOR}._build_mha_kv_pool": ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
        f"{_CONFIGURATOR}._build_hybrid_swa_kv_pool": (
            *("self", "full_max_total_num_tokens", "swa_max_total_num_tokens", "mha_pool_class"),
        ),
        f"{_CONFIGURATOR}._calculate_mamba_ratio": ("self",),
        f"{_CONFIGURATOR}._resolve_memory_pool_config": ("self", "pre_model_load_memory"),
        f"{_CONFIGURATOR}.resolve_max_num_reqs": ("self", "token_capacity"),
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator": ("kvc",),
        "sglang.srt.runtime_context.RuntimeContext.override": ("self", "source", "fields"),
        "sglang.srt.runtime_context.RuntimeContext.overrides_log": ("self",),
        f"{_POOLS}.ReqToTokenPool.__init__": ("self", "size", "max_context_len", "device", "enable_memory_saver"),
        f"{_POOLS}.MHATokenToKVPool.__init__": (
            *("self", "size", "page_size", "dtype", "head_num", "head_dim", "layer_num", "device"),
            *("enable_memory_saver", "v_head_dim", "start_layer", "end_layer", "enable_alt_stream"),
            *("enable_kv_cache_copy", "quant_method", "post_capture_active"),
        ),
        f"{_POOLS}.MHATokenToKVPool._create_buffers": ("self",),
        f"{_POOLS}.MHATokenToKVPool.get_kv_size_bytes": ("self",),
        f"{_ATTENTION}.init_forward_metadata": ("self", "forward_batch"),
        f"{_ATTENTION}.init_forward_metadata_out_graph": ("self", "forward_batch", "in_capture"),
        f"{_ATTENTION}.init_forward_metadata_in_graph": ("self", "forward_batch"),
        f"{_ATTENTION}.init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
        f"{_ATTENTION}.get_cuda_graph_seq_len_fill_value": ("self",),
        f"{_ATTENTION}.forward_decode": _ATTEND,
        f"{_ATTENTION}.forward_extend": _ATTEND,
    }
)

# What is relied on besides where drafts are asked for.
DRAFT_SIGNATURES: Final = MappingProxyType(
    {
        NGRAM_DRAFTS: ("self", "req_ids", "batch_tokens", "total_lens"),
        CONFIGURE_DTYPE: (*SIGNATURES[CONFIGURE_DTYPE], "speculative_draft_kv_cache_dtype"),
        f"{_ATTENTION}.update_verify_buffers_to_fill_after_draft": ("self", "spec_info", "cuda_graph_bs"),
        f"{_POOLS}.MHATokenToKVPool.move_kv_cache": ("self", "tgt_loc", "src_loc"),
        "sglang.srt.arg_groups.overrides.get_default_attn_backend": ("server_args", "use_mla_backend", "model_config"),
        "sglang.srt.layers.attention.verify_mask.maybe_create_verify_mask": (
            *("is_draft_runner", "skip_prefill", "max_bs", "max_context_len", "num_draft_tokens", "device", "is_read"),
        ),
        "sglang.srt.runtime_context.max_speculative_num_draft_tokens": (),
    }
)

# Attributes of KVCacheConfigurator, a dataclass, that the hooks read.
CONFIGURATOR_FIELDS: Final = (
    *("device", "model_config", "model_dtype", "kv_cache_dtype", "kv_cache_dtype_str", "page_size"),
    *("is_draft_worker", "is_hybrid_swa", "use_mla_backend", "sliding_window_size", "layer_info", "mambaish_config"),
    *("spec_algorithm", "spec_aux_config"),
)

# Models whose windows SGLang keeps among all tokens, for want of a test; here they get a pool of their own.
SPLIT_BY_US: Final = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
# Models that SGLang serves with attention backends of a list of its own, whatever plugins bring.
OWN_BACKENDS_ONLY: Final = (
    *("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
    *("DiffusionGemmaForBlockDiffusion", "EmbeddingGemma2Model", "Llama4ForConditionalGeneration"),
)
# What SGLang calls the pool of windows when it makes it.
WINDOW_POOL_LABEL: Final = "SWA"

# Switches of SGLang's own environment that change how a pool is laid out or sized.
UNSUPPORTED_ENVIRONMENT: Final = MappingProxyType(
    {
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "it resizes the cache after its tails and sinks were sized",
        "SGLANG_USE_HND_KVCACHE": "it arranges the cache by head and token, and records are neither",
    }
)
