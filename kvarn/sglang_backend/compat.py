"""Whether this SGLang is one that KVarN fits, and the proof that KVarN became active in it.

Private SGLang symbols stand in the ``compat`` modules and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kvarn
from kvarn import env
from kvarn.core.layers import LayerKind, count, layer_kinds, summary
from kvarn.core.table_pool import PoolSettings, pool_settings
from kvarn.engine import Engine
from kvarn.presets import is_preset_name
from kvarn.sglang_backend import compat_tables as tables
from kvarn.sglang_backend.compat_facts import (
    charged_request_limit,
    draft_bytes,
    draft_tokens,
    drafts_ngrams,
    latent_dims,
    shape_of,
)
from kvarn.sglang_backend.compat_layers import tile_pool_of, window_pool
from kvarn.signatures import field_differences, signature_differences

if TYPE_CHECKING:
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from kvarn.core.flash import FlashAttention

_SGLANG = Engine("SGLang", "sglang", tables.TESTED_VERSIONS, tables.RECOMMENDED_VERSION)
_FLASH_CAPABILITIES = (8, 9)


def engine_version() -> str:
    """Return the version of the SGLang that this process imports."""
    from sglang.version import __version__

    return str(__version__)


def differences(*, drafts: bool = False) -> list[str]:
    """Compare SGLang with the table; one phrase for each difference. Imports SGLang's memory and model modules.

    Args:
        drafts: whether speculative decoding was asked for.
    """
    rows = {**tables.SIGNATURES, **(tables.DRAFT_SIGNATURES if drafts else {})}
    configurator = tables.BUILD_POOL.rpartition(".")[0]
    return [*signature_differences(rows), *field_differences(configurator, tables.CONFIGURATOR_FIELDS)]


def require_tested_version() -> None:
    """Refuse a version outside the table. Cheap: imports no more than SGLang's version.

    Raises:
        EngineIncompatible: names the installed and the tested versions, and what to do.
    """
    _SGLANG.require_tested(engine_version())


def draft_version_reasons() -> list[str]:
    """Return why drafts can't be verified in this version, one sentence; empty if they can."""
    if _is_tested_for(tables.DRAFT_VERSIONS):
        return []
    return [
        f"--speculative-algorithm can't be used in SGLang {engine_version()}, in which drafts have not been tested "
        f"with tiles; leave it out or install sglang=={tables.DRAFT_VERSIONS[-1]}."
    ]


def captures_chunks(config: ModelConfig) -> bool:
    """Tell whether this version may capture a model's prefill in CUDA graphs, which leave attention to us.

    Not with latents (MLA): whether keys are expanded depends on the step, and a graph would hold one of both ways.
    """
    return latent_dims(config) is None and _is_tested_for(tables.CHUNK_GRAPH_VERSIONS)


def _is_tested_for(versions: tuple[str, ...]) -> bool:
    return engine_version().partition("+")[0] in versions or env.allow_untested_engine()


def require_compatible(*, drafts: bool = False) -> None:
    """Refuse an SGLang that differs from what the hooks rely on.

    Args:
        drafts: whether speculative decoding was asked for.

    Raises:
        EngineIncompatible: names the versions, what differs, and what to do.
    """
    require_tested_version()
    _SGLANG.require_alike(engine_version(), differences(drafts=drafts))


def verify_active(runner: ModelRunner) -> None:
    """Prove that every hook took; to be called when the attention backend is made, all pools in place.

    Raises:
        EngineIncompatible: lists everything that is not as it must be.
    """
    targets = (*tables.ENGINE_TARGETS, tables.NGRAM_DRAFTS) if drafts_ngrams() else tables.ENGINE_TARGETS
    problems = [*_unapplied_hooks(targets), *_mismatches(runner)]
    if problems:
        raise _SGLANG.incompatible(
            f"KVarN did not become active in this SGLang {engine_version()}: {'; '.join(problems)}.",
            "and look for other plugins that hook the same functions (SGLANG_PLUGINS=kvarn loads only this one)",
        )


def banner(runner: ModelRunner) -> str:
    """Return the line that tells an operator what is being served."""
    shape = shape_of(runner.kv_cache_configurator)
    raw = str(runner.kv_cache_configurator.model_dtype).removeprefix("torch.")
    ratio = shape.raw_bytes_per_token / shape.bytes_per_token
    verified = f" Up to {shape.draft_tokens} drafts are verified at once." if shape.draft_tokens else ""
    kinds = layer_kinds(runner.model_config.hf_text_config)
    layers = "" if count(kinds, LayerKind.TILES) == len(kinds) else f"layers: {summary(kinds)}; "
    return (
        f"KVarN {kvarn.__version__} in SGLang {engine_version()}: {shape.preset.name} "
        f"(format {shape.layout.identity}), {shape.bytes_per_token} bytes a token ({ratio:.2f}x smaller than {raw}), "
        f"{runner.max_total_num_tokens} tokens, at most {runner.max_running_requests} requests; {layers}kept in {raw}: "
        f"the open tile and newest {shape.tail_tokens} tokens of each running request, "
        f"the first {shape.sink_tokens} tokens of a prompt.{verified}"
    )


def query_heads(runner: ModelRunner) -> int:
    """Return the query heads of one rank."""
    from sglang.srt.runtime_context import get_parallel

    return int(runner.model_config.num_attention_heads) // int(get_parallel().attn_tp_size)


def flash_attention(device: torch.device) -> FlashAttention | None:
    """Return FlashAttention 3 of SGLang's kernel package; None where it isn't there or is for other GPUs."""
    import torch

    from kvarn.core.flash import flash_from

    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in _FLASH_CAPABILITIES:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    # 0: a context is split as far as the heads of few queries leave multiprocessors idle; the default is never
    return flash_from(flash_attn_varlen_func, version=3, num_splits=0)


def caps_logits(runner: ModelRunner) -> bool:
    """Tell whether some attention layer of the model has a soft cap on its logits."""
    return any(getattr(module, "logit_cap", 0) for module in runner.model.modules())


def learned_sinks(runner: ModelRunner) -> torch.Tensor | None:
    """Return the learned sinks of some attention layer of the model; None if there are none."""
    return next((module.sinks for module in runner.model.modules() if hasattr(module, "sinks")), None)


def expanded_widths(runner: ModelRunner) -> tuple[int, int] | None:
    """Return the widths of a key and of a value that long chunks of a model with latents (MLA) attend to.

    None for models that always attend with absorbed weights here: those that choose for themselves, and those that
    scale queries by their positions, which SGLang does for absorbed ones only.
    """
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA as Attention

    layers = [module for module in runner.model.modules() if isinstance(module, Attention)]
    choose = any(type(x).dispatch_attn_forward_method is not Attention.dispatch_attn_forward_method for x in layers)
    if not layers or choose or getattr(runner.model_config.hf_text_config, "llama_4_scaling", None):
        return None
    return layers[0].qk_head_dim, layers[0].v_head_dim


def turn(
    attention: Any, positions: torch.Tensor, q: torch.Tensor, q_rope: torch.Tensor, k_rope: torch.Tensor
) -> torch.Tensor:
    """Turn the last channels of queries, in place, and rope parts, which are returned, by their positions."""
    if attention.rotary_emb is not None:
        q_rope, k_rope = attention.rotary_emb(positions, q_rope, k_rope)
    q[..., attention.qk_nope_head_dim :] = q_rope
    return k_rope


def verify_mask(runner: ModelRunner) -> Any:
    """Return the mask that SGLang fills for every batch of drafts, in its smallest form: chains are read without."""
    from sglang.srt.layers.attention.verify_mask import maybe_create_verify_mask

    return maybe_create_verify_mask(
        is_draft_runner=False,
        skip_prefill=False,
        max_bs=runner.max_running_requests,
        max_context_len=runner.model_config.context_len,
        num_draft_tokens=draft_tokens() + 1,
        device=runner.req_to_token_pool.req_to_token.device,
        is_read=False,
    )


def require_plain_attention(layer: Any, k: object, save_kv_cache: bool, extras: dict[str, Any]) -> None:
    """Refuse a layer that asks for more than causal self-attention over the whole context.

    Raises:
        NotImplementedError: names what the layer asks for.
    """
    asked = [name for name, value in extras.items() if value is not None]
    asked += ["shared keys and values"] * (k is None or not save_kv_cache)
    asked += ["a sliding window"] * (layer.sliding_window_size > 0)
    asked += ["cross-attention"] * bool(layer.is_cross_attention)
    asked += [f"attention of type {layer.attn_type.value}"] * (layer.attn_type.value != "decoder")
    asked += ["a logit cap by method"] * (getattr(layer, "logit_capping_method", "tanh") not in (None, "tanh"))
    if asked:
        raise NotImplementedError(
            f"Layer {layer.layer_id} asks for {', '.join(asked)}, which KVarN can't serve yet. "
            "Serve this model without a kvarn cache dtype."
        )


def given_output(batch: ForwardBatch, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return where a piece of a prefill graph will read attention's result; None if there is no such place."""
    output: torch.Tensor | None = getattr(batch, "_attn_output", None)
    return None if output is None else output.view(shape)


def is_first_rank() -> bool:
    """Tell whether this process speaks for its tensor-parallel group."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_rank == 0)


def _unapplied_hooks(targets: tuple[str, ...]) -> list[str]:
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = (target for target in targets if target not in HookRegistry._patched)
    return [f"the hook on {target} was not applied" for target in missing]


def _mismatches(runner: ModelRunner) -> list[str]:
    """Compare what the pools are with what they must be, one phrase for each difference."""
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator
    from sglang.srt.runtime_context import get_exec

    configurator = runner.kv_cache_configurator
    if not is_preset_name(configurator.kv_cache_dtype_str):
        return [f"the cache dtype is {configurator.kv_cache_dtype_str!r}"]
    shape = shape_of(configurator)
    pool = tile_pool_of(runner.token_to_kv_pool)
    rows = runner.req_to_token_pool.req_to_token.shape[0]
    settings = getattr(type(pool), "settings", None)
    expected = pool_settings(shape, rows, configurator.model_dtype)
    tile = shape.preset.tile_tokens
    charged = charged_request_limit() or 0
    drafts = draft_bytes(configurator)
    windows = window_pool(configurator, shape, drafts)
    token_bytes = shape.bytes_per_token + drafts if windows is None else windows.bytes_of_both
    sizes = create_memory_pool_configurator(configurator)
    facts = (
        ("attention backend", tables.BACKEND_NAME, get_exec().kernel.attention_backend),
        ("pool settings", expected, settings if isinstance(settings, PoolSettings) else type(pool).__name__),
        ("page sizes", (tile,) * 3, (runner.page_size, pool.page_size, runner.token_to_kv_pool_allocator.page_size)),
        ("storage dtype", "torch.uint8", str(runner.kv_cache_dtype)),
        ("bytes a token", token_bytes, sizes._cell_size),
        ("layers", shape.layers, len(pool.layers)),
        ("tokens", runner.max_total_num_tokens, pool.size),
        ("rows of req_to_token", runner.max_running_requests + 1, rows),
        (f"tails charged for {runner.max_running_requests} requests", True, charged >= runner.max_running_requests),
    )
    return [f"{name}: {found!r} and not {wanted!r}" for name, wanted, found in facts if found != wanted]
