"""Which configurations of vLLM can be served, and why others can't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvarn import env
from kvarn.core.layers import LayerKind, layer_kinds
from kvarn.core.prefill_plan import LONG_ROWS
from kvarn.core.support import DeviceFacts, ModelFacts, unsupported_reasons
from kvarn.limits import Limit, limit_reasons
from kvarn.presets import get_preset, is_preset_name
from kvarn.vllm_backend import compat
from kvarn.vllm_backend.compat_tables import BATCH_INVARIANT, SELECTOR_FLAGS, SKIP_WINDOWS

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

_NOT_TESTED = "no test covers it yet"
# Methods that draft one chain of tokens, which the next step verifies in order.
_CHAINS = ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp")
_WITHOUT_MODEL = ("ngram", "ngram_gpu")


LIMITS = (
    Limit("cache_config.kv_offloading_size", None, "records move without their exact tails", "--kv-offloading-size"),
    Limit("cache_config.kv_sharing_fast_prefill", False, "layers there share caches", "--kv-sharing-fast-prefill"),
    Limit("parallel_config.pipeline_parallel_size", 1, _NOT_TESTED, "--pipeline-parallel-size"),
    Limit("parallel_config.data_parallel_size", 1, _NOT_TESTED, "--data-parallel-size"),
    Limit(
        "parallel_config.use_ubatching",
        False,
        "two half batches would write the same tails at once",
        "--enable-dbo or --ubatch-size above 1",
    ),
    Limit("attention_config.backend", None, "only KVarN's own reads tiles", "--attention-backend"),
    Limit(
        "scheduler_config.disable_hybrid_kv_cache_manager",
        False,
        "records and tails are caches of two kinds",
        "--disable-hybrid-kv-cache-manager",
    ),
    Limit("model_config.enable_sleep_mode", False, _NOT_TESTED, "--enable-sleep-mode"),
)


def reasons_against(fields: Mapping[str, Any], config: VllmConfig, capability: tuple[int, int] | None) -> list[str]:
    """Return why a layer can't be served, one sentence each; empty if it can.

    Args:
        fields: what vLLM's selector asks of a backend for this layer.
        config: vLLM's configuration.
        capability: CUDA compute capability; None without an NVIDIA GPU.
    """
    preset = get_preset(fields["kv_cache_dtype"])
    served = {BATCH_INVARIANT} if env.order_is_fixed() else set()
    asked = [why for flag, why in SELECTOR_FLAGS.items() if fields.get(flag) and flag not in served]
    text = config.model_config.hf_text_config
    # vLLM exempts layers with a window from a cache dtype, but not these.
    asked += ["has layers with chunked attention"] * bool(getattr(text, "attention_chunk_size", None))
    beside = frozenset(layer_kinds(text)) - {LayerKind.TILES}
    return [
        *unsupported_reasons(_facts(fields, config), preset, _device(config, capability), beside, latents=True),
        *(f"The model or a flag {why}; serve it with --kv-cache-dtype auto." for why in asked),
        *_block_reasons(config, preset.tile_tokens),
        *draft_reasons(
            config.speculative_config,
            preset.tile_tokens,
            hybrid=config.model_config.is_hybrid,
            windows=LayerKind.MODEL_DTYPE in beside,
        ),
        *limit_reasons(LIMITS, config),
    ]


def _facts(fields: Mapping[str, Any], config: VllmConfig) -> ModelFacts:
    """Return the facts of a layer. Layers of other kinds beside it are no limit: vLLM caches them by itself."""
    model = config.model_config
    head_dim = fields["head_size"]
    return ModelFacts(
        architecture=model.architecture,
        dtype=str(fields["dtype"]).removeprefix("torch."),
        head_dim=head_dim,
        v_head_dim=head_dim,
        latent_attention=fields["use_mla"],
        latent_dims=compat.latent_dims(config) if fields["use_mla"] else None,
        encoder_decoder=fields["attn_type"] in ("encoder_decoder", "encoder", "encoder_only"),
        kinds=frozenset({LayerKind.MODEL_DTYPE if fields["has_sliding_window"] else LayerKind.TILES}),
        learned_sinks=fields["has_sink"],
        generates=model.runner_type == "generate",
    )


def _device(config: VllmConfig, capability: tuple[int, int] | None) -> DeviceFacts:
    kind = config.device_config.device_type
    return DeviceFacts(kind, tuple(capability) if kind == "cuda" and capability is not None else None)


def _block_reasons(config: VllmConfig, tile: int) -> list[str]:
    cache = config.cache_config
    reasons = []
    if cache.user_specified_block_size and cache.block_size % tile:
        reasons.append(
            f"--block-size {cache.block_size} is not a multiple of the tile of {tile} tokens; leave the flag out."
        )
    if set(cache.kv_cache_dtype_skip_layers) - {SKIP_WINDOWS}:
        reasons.append(
            "--kv-cache-dtype-skip-layers can't be used, because a cache of two dtypes has blocks that no tile fits "
            "yet; leave it out."
        )
    unit = getattr(cache, "prefix_match_unit", None)
    if unit is not None and unit % tile:
        reasons.append(f"--prefix-match-unit {unit} is not a multiple of the tile of {tile} tokens; leave it out.")
    return reasons


def draft_reasons(speculative: SpeculativeConfig | None, tile: int, *, hybrid: bool, windows: bool) -> list[str]:
    """Return why drafts can't be verified, one sentence each; empty if they can.

    Args:
        speculative: vLLM's configuration of them; None if there are none.
        tile: tokens of a tile.
        hybrid: whether some layers keep a recurrent state.
        windows: whether some layers have a window.
    """
    if speculative is None:
        return []
    reasons = []
    if hybrid:
        reasons.append(
            "--speculative-config can't be used with a model that has linear-attention or Mamba layers, because "
            f"{_NOT_TESTED}; leave it out."
        )
    if windows and speculative.method in _CHAINS and speculative.method not in _WITHOUT_MODEL:
        reasons.append(
            f"--speculative-config with method {speculative.method!r} can't be used with a model that has "
            f"sliding-window layers, because {_NOT_TESTED}; leave it out or use {' or '.join(_WITHOUT_MODEL)}."
        )
    if speculative.method not in _CHAINS or speculative.parallel_drafting:
        reasons.append(
            f"--speculative-config with method {speculative.method!r} can't be used, because drafts must be one chain, "
            "made token by token: a rejected branch could not be taken out of a quantised tile; leave it out or use "
            f"one of {', '.join(_CHAINS)} without parallel drafting."
        )
    most = min(tile, LONG_ROWS)
    if speculative.num_speculative_tokens >= most:
        reasons.append(
            f"--speculative-config with num_speculative_tokens {speculative.num_speculative_tokens} can't be used, "
            f"because a request's rows of one step would no longer be few; leave it out or use fewer than {most}."
        )
    if is_preset_name(speculative.kv_cache_dtype):
        reasons.append(
            f"--speculative-config with kv_cache_dtype {speculative.kv_cache_dtype} can't be used, because a draft "
            "model's cache has no exact tail; leave kv_cache_dtype out."
        )
    return reasons
