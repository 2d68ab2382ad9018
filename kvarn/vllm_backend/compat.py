"""Whether this vLLM is one that KVarN fits, and how KVarN gets into it.

Private vLLM symbols stand in the ``compat`` modules and nowhere else. Everything that registers may be called again
and then changes nothing.
"""

from __future__ import annotations

import inspect
import logging
import sys
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import kvarn
from kvarn.engine import Engine
from kvarn.patching import is_wrapped, wrap_once
from kvarn.presets import PRESETS, is_preset_name
from kvarn.signatures import signature_differences
from kvarn.vllm_backend import compat_tables as tables

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvarn.core.capacity import CacheShape
    from kvarn.core.flash import FlashAttention

_VLLM = Engine("vLLM", "vllm", tables.TESTED_VERSIONS, tables.RECOMMENDED_VERSION)
_FLASH_VERSIONS = (2, 3)


def engine_version() -> str:
    """Return the version of the vLLM that this process imports."""
    from vllm.version import __version__

    return str(__version__)


def require_compatible() -> None:
    """Refuse a vLLM outside the table, or one that differs from what the adapter relies on.

    Raises:
        EngineIncompatible: names the versions, what differs, and what to do.
    """
    version = engine_version()
    _VLLM.require_tested(version)
    _VLLM.require_alike(version, signature_differences(tables.SIGNATURES))


def add_dtypes() -> None:
    """Let ``--kv-cache-dtype`` take our names: storage is bytes, and to vLLM no mode of quantisation of its own."""
    try:
        from vllm.config.cache import register_kv_cache_dtype
    except ImportError:
        _add_dtypes_to_literal()
        return
    from vllm.config.cache import is_known_kv_cache_dtype

    for name in PRESETS:
        if not is_known_kv_cache_dtype(name):
            register_kv_cache_dtype(name)(type("_Handler", (_DtypeHandler,), {"name": name}))


def add_backend() -> None:
    """Register the attention backend under its name."""
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(tables.BACKEND_NAME, f"{tables.BACKEND_MODULE}.{tables.BACKEND_CLASS}")


def select_backend_by(choose: Callable[[type, Any], str]) -> None:
    """Let `choose` name the attention backend of layers with a kvarn cache dtype.

    Args:
        choose: takes the platform and the selector's config, returns a class path or raises.
    """
    from vllm.platforms import current_platform

    def get_attn_backend_cls(original: Callable[..., str], cls: type, *args: Any, **kwargs: Any) -> str:
        asked = inspect.signature(original).bind(cls, *args, **kwargs).arguments["attn_selector_config"]
        return choose(cls, asked) if is_preset_name(asked.kv_cache_dtype) else original(cls, *args, **kwargs)

    wrap_once(type(current_platform), "get_attn_backend_cls", get_attn_backend_cls)


def register_spec(spec: type, manager: type) -> None:
    """Register a kind of cache and who hands out its blocks."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    # vLLM fills an empty registry with its own specs when it is first asked; ours alone would keep it from that.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def watch_admissions(note: Callable[[Any, list[int]], None]) -> None:
    """Call `note` before every step with the TailCache and the first tail block of each request admitted in it.

    Blocks change hands without the worker being told; a request's first step, or its first after a preemption, is
    when it gets new ones. Only runners that are imported already are watched: one of them is loading the model.
    """

    def execute_model(
        original: Callable[..., Any], runner: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        tail = tail_of(runner.vllm_config)
        if tail is not None and tail.is_bound:
            group = _group_of(runner.kv_cache_config, tail.layer_name)
            note(tail, _admitted_blocks(scheduler_output, group))
        return original(runner, scheduler_output, *args, **kwargs)

    for runner in _runners():
        wrap_once(runner, "execute_model", execute_model)


def before_warm_up(call: Callable[[Any], None]) -> None:
    """Call `call` with the TailCache when a worker's caches are there and it begins to warm up."""
    from vllm.v1.worker.gpu_worker import Worker

    def compile_or_warm_up_model(original: Callable[[Any], Any], worker: Any) -> Any:
        tail = tail_of(worker.vllm_config)
        if tail is not None and tail.is_bound:
            call(tail)
        return original(worker)

    wrap_once(Worker, "compile_or_warm_up_model", compile_or_warm_up_model)


def require_watched() -> None:
    """Refuse to run where admissions go unseen.

    Raises:
        EngineIncompatible: another package replaced the method that is watched.
    """
    runners = _runners()
    lost = [runner.__module__ for runner in runners if not is_wrapped(runner.execute_model)]
    if lost or not runners:
        raise _VLLM.incompatible(
            f"KVarN does not see which requests vLLM {engine_version()} admits ({', '.join(lost) or 'no runner'}).",
            "and look for other plugins that replace execute_model (VLLM_PLUGINS=kvarn loads only this one)",
        )


def tail_of(vllm_config: VllmConfig) -> Any:
    """Return the TailCache of a model, or None before its weights are loaded."""
    context = vllm_config.compilation_config.static_forward_context
    return next((layer for name, layer in context.items() if name.endswith(tables.TAIL_SUFFIX)), None)


def layers_with(vllm_config: VllmConfig, backend: type) -> dict[str, Any]:
    """Return the attention layers of a backend by name, in the model's order."""
    context = vllm_config.compilation_config.static_forward_context
    return {n: layer for n, layer in context.items() if issubclass(getattr(layer, "attn_backend", object), backend)}


def draft_tokens(vllm_config: VllmConfig) -> int:
    """Return the most drafts that a step verifies for a request."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens)


def latent_dims(vllm_config: VllmConfig) -> tuple[int, int]:
    """Return the channels of a model's latents (MLA) and of their rope parts."""
    text = vllm_config.model_config.hf_text_config
    return int(text.kv_lora_rank), int(text.qk_rope_head_dim)


def reserve_in_profile(layer: Any, needed_bytes: int, dtype: torch.dtype) -> None:
    """Let an MLA layer take so much memory in vLLM's profiling run, in which it attends to nothing.

    There it takes what keys and values of some tokens take in the model's dtype, as many as vLLM would make from
    cached latents at a time.
    """
    token_bytes = layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim) * dtype.itemsize
    layer._chunked_prefill_workspace_size = -(-needed_bytes // token_bytes)


def keep_drafts_raw(vllm_config: VllmConfig) -> None:
    """Keep the cache of a draft model in its own dtype, unless the user names another.

    To be called while the model's layers are made: a draft model's are made later and look at the setting then.
    """
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.kv_cache_dtype is None:
        speculative.kv_cache_dtype = "auto"


def add_layer(vllm_config: VllmConfig, name: str, layer: Any) -> None:
    """Let vLLM allocate a cache for a layer that is no part of the model."""
    vllm_config.compilation_config.static_forward_context[name] = layer


def metadata_of(layer_name: str) -> Any:
    """Return a layer's metadata of the running step."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata[layer_name]


def flash_attention(device: torch.device, head_dim: int) -> FlashAttention | None:
    """Return the flash attention that vLLM would choose, of a version tested here; None where there is none."""
    if device.type != "cuda":
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    from kvarn.core.flash import flash_from

    version = get_flash_attn_version(head_size=head_dim)
    return flash_from(flash_attn_varlen_func, fa_version=version) if version in _FLASH_VERSIONS else None


def announce(shape: CacheShape, kinds: str, raw_dtype: object, blocks_per_request: int) -> None:
    """Log the line that tells an operator what is being served, once a server."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() != 0:
        return
    raw = str(raw_dtype).removeprefix("torch.")
    ratio = shape.raw_bytes_per_token / shape.bytes_per_token
    # A child of vLLM's logger, whose handler prints it.
    logging.getLogger("vllm.kvarn").info(
        "KVarN %s in vLLM %s: %s (format %s), layers: %s; %d bytes a token (%.2fx smaller than %s); kept in %s: the "
        "open tile and newest %d tokens of each running request, in %d blocks of it, and a prompt's first %d tokens.",
        *(kvarn.__version__, engine_version(), shape.preset.name, shape.layout.identity, kinds, shape.bytes_per_token),
        *(ratio, raw, raw, shape.tail_tokens, blocks_per_request, shape.sink_tokens),
    )


class _DtypeHandler:
    """vLLM's contract for a cache dtype of a plugin."""

    name: str

    def torch_dtype(self) -> Any:
        """Return the storage dtype."""
        import torch

        return torch.uint8

    def quant_mode(self) -> Any:
        """Return that vLLM itself quantises nothing: any other mode makes MLA code assume fp8."""
        from vllm.v1.kv_cache_interface import KVQuantMode

        return KVQuantMode.NONE


def _add_dtypes_to_literal() -> None:
    """Before 0.33 the names are a Literal, checked by pydantic and listed by argparse."""
    import torch
    import vllm.config.cache as cache
    import vllm.config.vllm as config
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention import selector

    known = typing.get_args(cache.CacheDType)
    if set(PRESETS) <= set(known):
        return
    widened = typing.Literal[(*known, *PRESETS)]
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(PRESETS, torch.uint8))
    for module in (cache, selector, arg_utils):
        module.CacheDType = widened
    cls = cache.CacheConfig
    cls.__annotations__["cache_dtype"] = widened
    cls.__dataclass_fields__["cache_dtype"].type = widened
    cls.__pydantic_fields__["cache_dtype"].annotation = widened
    rebuild_dataclass(cls, force=True)
    rebuild_dataclass(config.VllmConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()


def _runners() -> list[Any]:
    """Return the classes of model runners that are imported."""
    found = (getattr(sys.modules.get(module), tables.RUNNER_CLASS, None) for module in tables.RUNNERS)
    return [runner for runner in found if runner is not None]


def _admitted_blocks(output: SchedulerOutput, group: int) -> list[int]:
    blocks = [request.block_ids[group][0] for request in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
        if request_id in cached.resumed_req_ids:
            blocks.append(new_blocks[group][0])
    return blocks


def _group_of(kv_cache_config: Any, layer_name: str) -> int:
    groups = enumerate(kv_cache_config.kv_cache_groups)
    return next(i for i, group in groups if layer_name in group.layer_names)
