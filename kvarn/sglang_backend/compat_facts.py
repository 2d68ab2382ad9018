"""What KVarN reads from SGLang's private objects, as plain values of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn.core.capacity import CacheShape, cache_shape, raw_token_bytes
from kvarn.core.support import DeviceFacts, ModelFacts
from kvarn.presets import get_preset, is_preset_name
from kvarn.sglang_backend.compat_layers import kinds_of, layer_ids
from kvarn.sglang_backend.compat_tables import BACKEND_NAME, UNSUPPORTED_ENVIRONMENT

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.server_args import ServerArgs


def holds_tiles(configurator: KVCacheConfigurator) -> bool:
    """Tell whether the pool of this runner is ours: a kvarn dtype, and not a draft model's."""
    return is_preset_name(configurator.kv_cache_dtype_str) and not configurator.is_draft_worker


def shape_of(configurator: KVCacheConfigurator) -> CacheShape:
    """Return what this rank caches."""
    from sglang.srt.runtime_context import get_parallel

    config = configurator.model_config
    return cache_shape(
        get_preset(str(configurator.kv_cache_dtype_str)),
        layers=len(layer_ids(configurator)),
        kv_heads=config.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=config.head_dim,
        raw_bytes=configurator.model_dtype.itemsize,
        draft_tokens=draft_tokens(),
        latent_dims=latent_dims(config),
    )


def latent_dims(config: ModelConfig) -> tuple[int, int] | None:
    """Return the channels of a model's latents (MLA) and of their rope parts; None if it has none."""
    if config.attention_arch.name != "MLA":
        return None
    return int(config.kv_lora_rank), int(config.qk_rope_head_dim)


def draft_tokens() -> int:
    """Return the most tokens that a step verifies for a request beside the one that is certain; 0 without drafts."""
    from sglang.srt.runtime_context import get_spec

    if get_spec().speculative_algorithm is None:
        return 0
    from sglang.srt.runtime_context import max_speculative_num_draft_tokens

    return int(max_speculative_num_draft_tokens()) - 1


def drafts_ngrams() -> bool:
    """Tell whether drafts come from SGLang's corpus of n-grams."""
    from sglang.srt.runtime_context import get_spec

    return bool(get_spec().speculative_algorithm == "NGRAM")


def draft_bytes(configurator: KVCacheConfigurator) -> int:
    """Return the bytes that a draft model caches of each token on this rank, in rows of its own; 0 without one."""
    if configurator.spec_algorithm.is_none() or configurator.spec_aux_config.draft_model_config is None:
        return 0
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
    from sglang.srt.runtime_context import get_parallel, get_spec

    config = configurator.spec_aux_config.draft_model_config
    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=str(configurator.kv_cache_dtype_str),
        model=None,
        model_dtype=config.dtype,
        is_draft_worker=True,
        is_dflash=False,
        speculative_draft_attention_backend=get_spec().speculative_draft_attention_backend,
        speculative_draft_kv_cache_dtype=get_spec().speculative_draft_kv_cache_dtype,
    )
    return raw_token_bytes(
        layers=configurator.spec_aux_config.draft_kv_num_layers,
        kv_heads=config.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        raw_bytes=dtype.itemsize,
    )


def limits_of_schedule() -> tuple[int | None, int | None]:
    """Return the request limit and the token limit that SGLang works with; None where there is none."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    return schedule.max_running_requests, schedule.max_total_tokens


def charged_request_limit() -> int | None:
    """Return the request limit whose tails were charged to the budget in this process; None if none were."""
    from sglang.srt.runtime_context import get_context

    ours = (fields for source, fields in reversed(get_context().overrides_log()) if source == BACKEND_NAME)
    return next((fields["max_running_requests"] for fields in ours), None)


def model_config(server_args: object) -> ModelConfig:
    """Return SGLang's description of the model that was asked for."""
    if hasattr(server_args, "get_model_config"):
        config: ModelConfig = server_args.get_model_config()
        return config
    from sglang.srt.arg_groups.overrides import model_config_of

    found: ModelConfig = model_config_of(server_args)
    return found


def facts_of_config(config: ModelConfig) -> ModelFacts:
    """Return the facts that a model config tells."""
    from sglang.srt.configs.model_config import is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse

    hf_config = config.hf_config
    attention = config.attention_arch.name
    return ModelFacts(
        architecture=(hf_config.architectures or ["of unknown class"])[0],
        dtype=str(config.dtype).removeprefix("torch."),
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        latent_attention=attention == "MLA",
        latent_dims=latent_dims(config),
        encoder_decoder=config.is_encoder_decoder,
        kinds=kinds_of(config),
        sparse_index=(
            any(check(hf_config) for check in (is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse))
            or getattr(config.hf_text_config, "indexer_n_heads", None) is not None
        ),
        learned_sinks=bool(getattr(config, "has_attention_sinks", False)),
        alibi=bool(getattr(config, "use_alibi", False)),
        generates=config.is_generation,
    )


def device_facts(view: ServerArgs) -> DeviceFacts:
    """Return what decides whether the device that was asked for can be used.

    Args:
        view: the flags, ``device`` resolved.
    """
    kind = view.device
    if kind != "cuda":
        return DeviceFacts(kind)
    import torch

    if torch.version.hip is not None:
        return DeviceFacts("rocm")
    if not torch.cuda.is_available():
        # SGLang says so itself, and better.
        return DeviceFacts(kind)
    return DeviceFacts(kind, torch.cuda.get_device_capability(view.base_gpu_id))


def environment_reasons() -> list[str]:
    """Return why SGLang's own environment variables can't be served, one sentence each."""
    from sglang.srt.environ import envs

    return [
        f"{name}=1 can't be used, because {why}; unset it."
        for name, why in UNSUPPORTED_ENVIRONMENT.items()
        if getattr(envs, name, None) is not None and getattr(envs, name).get()
    ]
