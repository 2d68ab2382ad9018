"""How KVarN gets into SGLang: choices, hooks, steps of flag resolution, and the calls that those need.

SGLang only logs what a plugin raises, so a refusal is raised later, from inside a hook, where it stops the server.
Everything that registers may be called again and then changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

from kvarn.errors import EngineIncompatible
from kvarn.presets import PRESETS, is_preset_name
from kvarn.sglang_backend import compat_tables as tables
from kvarn.sglang_backend.compat_tables import BACKEND_NAME

# Hooks take whatever the function they wrap takes.
Hook = Callable[..., Any]


class _DtypeNames(list[str]):
    """Choices that let every kvarn name through, so that a misspelt one gets our answer and not argparse's."""

    def __contains__(self, name: object) -> bool:
        return is_preset_name(name) or super().__contains__(name)


def add_hook(target: str, hook: Hook, kind: str) -> None:
    """Register a hook with SGLang's registry.

    Args:
        target: dotted path of a function or method.
        hook: called as the kind says; a module-level function, so that it is known again.
        kind: ``before``, ``after`` or ``around``.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    if not _is_registered(target, hook):
        HookRegistry.register(target, hook, HookType(kind), source=HookSource(BACKEND_NAME, BACKEND_NAME))


def apply_hooks() -> None:
    """Apply hooks that were registered after SGLang had loaded its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()


def has_resolution_steps() -> bool:
    """Tell whether this SGLang resolves its flags in named steps (0.5.18 on) and not in methods."""
    return importlib.util.find_spec("sglang.srt.arg_groups.resolution_hooks") is not None


def add_step(name: str, wrapper: Hook) -> None:
    """Wrap one step of flag resolution.

    Raises:
        EngineIncompatible: there is no such step.
    """
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS, _OVERRIDABLE_HOOKS, register_resolution_hook

    if name not in _OVERRIDABLE_HOOKS:
        raise EngineIncompatible(
            f"This SGLang resolves its flags without the step {name!r}, so that KVarN can't decide them. "
            f"Install a tested version (pip install sglang=={tables.RECOMMENDED_VERSION}) or a newer KVarN."
        )
    if wrapper not in _HOOKS.get(name, ()):
        register_resolution_hook(name)(wrapper)


def add_backend(create: Hook) -> None:
    """Register the attention backend."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(BACKEND_NAME)(create)


def choose_latent_attention(expands: Callable[[], bool]) -> None:
    """Let models with latents (MLA) ask our backend for attention to expanded keys, or with absorbed weights.

    Args:
        expands: tells which it is in the present step.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

    methods = AttnForwardMethod.MLA, AttnForwardMethod.MHA
    AttentionBackendRegistry.register(BACKEND_NAME, lambda attention, forward_batch: methods[expands()])


def add_backend_choice() -> None:
    """Let users name the attention backend, with deterministic inference and its prefix cache, too."""
    from sglang.srt import server_args

    for choices in (
        server_args.ATTENTION_BACKEND_CHOICES,
        server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        if BACKEND_NAME not in choices:
            choices.append(BACKEND_NAME)


def add_dtype_choices(parser: argparse.ArgumentParser) -> None:
    """Let ``--kv-cache-dtype`` take our names."""
    for action in parser._actions:
        if action.dest == "kv_cache_dtype" and action.choices is not None:
            action.choices = _DtypeNames([*action.choices, *PRESETS])


def runs_models() -> bool:
    """Tell whether this process has imported what runs a model; tokenizers and detokenizers have not."""
    return tables.ENGINE_MODULE in sys.modules


def flags_of(server_args: object) -> Any:
    """Return a view of the flags as far as SGLang has resolved them."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def declare_flags(server_args: object, flags: Mapping[str, object]) -> None:
    """Decide flags during resolution."""
    if has_resolution_steps():
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(server_args, BACKEND_NAME, **flags)
        return
    for flag, value in flags.items():
        setattr(server_args, flag, value)


def default_attention_backend(server_args: object) -> str:
    """Return the attention backend that SGLang would choose for these flags if ours had not been asked for.

    What it chooses for a model with latents (MLA) serves drafts with keys and values, too. With drafts and pages of
    several tokens it leaves FlashAttention 3 out, which can't do that for trees of drafts; ours are chains. What it
    takes instead, if FlashInfer is missing, reads a long context many times as slowly.
    """
    view = flags_of(server_args)
    if view.device == "cpu":
        return tables.CPU_BACKEND
    from sglang.srt.arg_groups.overrides import get_default_attn_backend, model_config_of

    config = model_config_of(server_args)
    asked = {"use_mla_backend": config.attention_arch.name == "MLA", "model_config": config}
    for_one_token = str(get_default_attn_backend(_OneTokenPages(view), **asked))
    return (
        tables.FLASH_BACKEND if for_one_token == tables.FLASH_BACKEND else str(get_default_attn_backend(view, **asked))
    )


class _OneTokenPages:
    """A view of flags in which pages have one token."""

    page_size = 1
    # no decisions beside those that the view tells
    _resolved_overrides = ()

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getattr__(self, flag: str) -> Any:
        return getattr(self._view, flag)


def publish_request_limit(requests: int) -> None:
    """Set SGLang's request limit for this process, as if ``--max-running-requests`` had been typed.

    SGLang logs who set it, and the log proves later that the tails of these requests were charged.
    """
    from sglang.srt.runtime_context import get_context

    get_context().override(BACKEND_NAME, max_running_requests=requests)


def _is_registered(target: str, hook: Hook) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return any(registered is hook for _, registered, _ in HookRegistry._hooks.get(target, ()))
