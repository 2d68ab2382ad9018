"""SGLang's entry point of KVarN.

``register`` runs in every process that loads SGLang's plugins. It adds our names to the choices and two steps to the
resolution of flags; nothing else, unless a kvarn dtype was asked for. Then the step sets an environment variable, and
the schedulers, which inherit it, install the hooks on memory pools.
"""

import argparse
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from kvarn import env
from kvarn.core.layers import LayerKind
from kvarn.core.support import DeviceFacts, unsupported_reasons
from kvarn.core.table_pool import PoolSettings, divide_budget, pool_settings
from kvarn.errors import EngineIncompatible, UnsupportedConfig
from kvarn.presets import PRESETS, Preset, get_preset, is_preset_name
from kvarn.sglang_backend import compat, compat_facts, compat_hooks, compat_layers, resolution
from kvarn.sglang_backend import compat_tables as tables
from kvarn.sglang_backend.drafts import declared_draft_flags, drafts_with_model

logger = logging.getLogger(__name__)
_SIZE_ADVICE = (
    "In SGLang these are --max-running-requests and --mem-fraction-static; KVARN_TAIL_TOKENS=0 makes the tails smaller."
)


def register() -> None:
    """Register KVarN with SGLang. Cheap, and may be called again.

    Raises:
        EngineIncompatible: this SGLang resolves its flags in a way that is not known here. SGLang logs it; a server
            that is asked for a kvarn dtype stops all the same.
    """
    compat_hooks.add_backend_choice()
    compat_hooks.add_hook(tables.ADD_CLI_ARGS, accept_names, "after")
    compat_hooks.add_hook(tables.FROM_CLI_ARGS, check_command_line, "before")
    if compat_hooks.has_resolution_steps():
        compat_hooks.add_step(tables.EARLY_STEP, early_step)
        compat_hooks.add_step(tables.MODEL_STEP, model_step)
        compat_hooks.add_step(tables.LATE_STEP, late_step)
    else:
        compat_hooks.add_hook(tables.EARLY_METHOD, early_method, "before")
        compat_hooks.add_hook(tables.MODEL_METHOD, model_method, "around")
        compat_hooks.add_hook(tables.LATE_METHOD, late_method, "after")
    if env.sglang_hooks() and compat_hooks.runs_models():
        add_engine_hooks()


def add_engine_hooks() -> None:
    """Register what changes memory pools and attention; only for processes that run a model. May be called again."""
    compat_hooks.add_backend(create_backend)
    compat_hooks.add_hook(tables.CONFIGURE_DTYPE, storage_dtype, "around")
    compat_hooks.add_hook(tables.PROFILE_BYTES, charge_exact_rows, "after")
    compat_hooks.add_hook(tables.CELL_SIZE, record_bytes, "after")
    compat_hooks.add_hook(tables.PRICE_TOKEN, price_token, "after")
    compat_hooks.add_hook(tables.BUILD_POOL, build_pool, "around")
    compat_hooks.add_hook(tables.LAYER_SPLIT, compat_layers.split_windows, "after")
    compat_hooks.add_hook(tables.WINDOW_SIZES, size_windows, "after")


# --- command line and flags, in the process that launches SGLang


def accept_names(_result: None, parser: argparse.ArgumentParser) -> None:
    """After ``ServerArgs.add_cli_args``: let every kvarn name pass argparse."""
    compat_hooks.add_dtype_choices(parser)


def check_command_line(_cls: type, args: argparse.Namespace) -> None:
    """Before ``ServerArgs.from_cli_args``: answer a wrong name or version before anything is downloaded.

    Raises:
        UnknownPreset: the name is not a preset.
        EngineIncompatible: this SGLang is not one that KVarN was tested with.
    """
    _asked_preset(getattr(args, "kv_cache_dtype", None))


def early_step(server_args: object, previous: Callable[[object], None]) -> None:
    """Around the first step that reads a flag of ours (0.5.18 on)."""
    decide_flags(server_args)
    previous(server_args)


def model_step(server_args: Any, previous: Callable[[object], None]) -> None:
    """Around the step that lets only backends of a list serve some models (0.5.18 on): ours passes for one of them."""
    ours = _asked_preset(server_args.kv_cache_dtype) is not None
    listed = ours and compat_layers.lists_backends(compat_facts.model_config(server_args))
    if listed:
        compat_hooks.declare_flags(server_args, {"attention_backend": tables.LISTED_BACKEND})
    previous(server_args)
    if listed:
        compat_hooks.declare_flags(server_args, {"attention_backend": tables.BACKEND_NAME})


def late_step(server_args: object, previous: Callable[[object], None]) -> None:
    """Around the last step (0.5.18 on)."""
    previous(server_args)
    confirm_flags(server_args)


def early_method(server_args: object) -> None:
    """Before the first method that reads a flag of ours (0.5.17)."""
    decide_flags(server_args)


def model_method(original: Callable[[object], None], server_args: object) -> None:
    """Around the method that does the same (0.5.17)."""
    model_step(server_args, original)


def late_method(_result: None, server_args: object) -> None:
    """After the last method (0.5.17)."""
    confirm_flags(server_args)


def decide_flags(server_args: object) -> None:
    """Refuse what can't be served and decide what follows from the dtype; nothing for any other dtype.

    Raises:
        UnknownPreset: the name is not a preset.
        UnsupportedConfig: lists every reason.
        EngineIncompatible: this SGLang is not one that KVarN was tested with.
    """
    preset = _asked_preset(getattr(server_args, "kv_cache_dtype", None))
    if preset is None:
        if resolution.asks_for_backend(server_args):
            name, dtypes = tables.BACKEND_NAME, ", ".join(PRESETS)
            raise UnsupportedConfig(
                [f"The attention backend {name!r} reads records only; pass --kv-cache-dtype, one of {dtypes}."]
            )
        return
    view = compat_hooks.flags_of(server_args)
    drafts = view.speculative_algorithm is not None
    config = compat_facts.model_config(server_args)
    chunk_graphs = compat.captures_chunks(config)
    reasons = [
        *resolution.flag_reasons(view, preset, chunk_graphs=chunk_graphs),
        *(compat.draft_version_reasons() if drafts else []),
        *compat_layers.layer_reasons(view, config, preset),
        *compat_facts.environment_reasons(),
        *_model_reasons(config, preset, compat_facts.device_facts(view)),
    ]
    if reasons:
        raise UnsupportedConfig(reasons)
    compat.require_compatible(drafts=drafts)
    decided = resolution.declared_flags(preset, chunk_graphs=chunk_graphs)
    compat_hooks.declare_flags(server_args, {**decided, **declared_draft_flags(view)})
    if drafts_with_model(view) and view.speculative_draft_attention_backend is None:
        backend = compat_hooks.default_attention_backend(server_args)
        compat_hooks.declare_flags(server_args, {"speculative_draft_attention_backend": backend})
    env.request_sglang_hooks()
    # This process may run the model itself, and has loaded its plugins already.
    add_engine_hooks()
    compat_hooks.apply_hooks()


def confirm_flags(server_args: Any) -> None:
    """Check at the end of resolution that a model's own defaults have not undone ours.

    Raises:
        UnsupportedConfig: lists every reason.
    """
    name = server_args.kv_cache_dtype
    if not is_preset_name(name):
        return
    chunk_graphs = compat.captures_chunks(compat_facts.model_config(server_args))
    reasons = resolution.final_reasons(compat_hooks.flags_of(server_args), get_preset(name), chunk_graphs=chunk_graphs)
    if reasons:
        raise UnsupportedConfig(reasons)


# --- memory pools and attention, in processes that run the model


def storage_dtype(original: Callable[..., Any], **arguments: Any) -> Any:
    """Around ``configure_kv_cache_dtype``: records are bytes; a draft model keeps its own dtype.

    Raises:
        EngineIncompatible: this SGLang differs from what the other hooks rely on.
    """
    if not is_preset_name(arguments["server_args_kv_cache_dtype"]):
        return original(**arguments)
    if arguments["is_draft_worker"]:
        name, dtype = original(**{**arguments, "server_args_kv_cache_dtype": "auto"})
        return name or "auto", dtype
    import torch

    compat.require_compatible()
    return None, torch.uint8


def charge_exact_rows(budget_bytes: int, configurator: Any, *_args: Any, **_kwargs: Any) -> int | None:
    """After ``_profile_available_bytes``: charge tails and sinks, and derive the request limit if none was typed.

    Raises:
        UnsupportedConfig: the loaded model has layers that the flags did not tell of.
        CapacityError: tails and sinks leave no room for a page.
    """
    if not compat_facts.holds_tiles(configurator):
        return None
    _check_loaded_model(configurator)
    shape = compat_facts.shape_of(configurator)
    requested, token_cap = compat_facts.limits_of_schedule()
    draft_bytes = compat_facts.draft_bytes(configurator)
    most = compat_layers.state_limit(configurator)
    windows = compat_layers.window_pool(configurator, shape, draft_bytes)
    if windows is not None and requested is None:
        most = windows.most_requests(budget_bytes)
    plan = divide_budget(shape, budget_bytes, requested, token_cap, draft_bytes, most, _SIZE_ADVICE)
    compat_hooks.publish_request_limit(plan.max_requests)
    if windows is not None:
        return windows.bytes_left(plan)
    return plan.tokens * (shape.bytes_per_token + draft_bytes)


def record_bytes(_cell_size: int, _self: Any, configurator: Any, *_args: Any, **_kwargs: Any) -> int | None:
    """After ``_compute_cell_size``: what a token costs as part of a record."""
    if not compat_facts.holds_tiles(configurator):
        return None
    return compat_facts.shape_of(configurator).bytes_per_token


def price_token(_result: None, sizes: Any, configurator: Any) -> None:
    """After ``DefaultPoolConfigurator.__init__``, which prices a draft model's layers like ours: at their own size."""
    if compat_facts.holds_tiles(configurator):
        draft_bytes = compat_facts.draft_bytes(configurator)
        sizes._cell_size = compat_facts.shape_of(configurator).bytes_per_token + draft_bytes


def size_windows(_result: None, sizes: Any, configurator: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``HybridSWAPoolConfigurator.__init__``: price tiles and windows each at their own bytes."""
    if not compat_facts.holds_tiles(configurator):
        return
    shape, draft_bytes = compat_facts.shape_of(configurator), compat_facts.draft_bytes(configurator)
    windows = compat_layers.window_pool(configurator, shape, draft_bytes)
    if windows is not None:
        compat_layers.price_windows(sizes, windows)


def build_pool(original: Callable[..., Any], configurator: Any, **arguments: Any) -> Any:
    """Around ``_build_token_to_kv_pool``: build a TilePool for the rows that ``req_to_token`` really has."""
    if not compat_facts.holds_tiles(configurator):
        return original(configurator, **arguments)
    sizes, table = arguments["sizes"], arguments["req_to_token_pool"]
    rows = table.req_to_token.shape[0]
    if rows != sizes.max_running_requests + 1:
        raise EngineIncompatible(
            f"SGLang made {rows} request rows for {sizes.max_running_requests} requests, but tails were charged for "
            "one spare row only. Leave out the flags that reserve request rows."
        )
    settings = pool_settings(compat_facts.shape_of(configurator), rows, configurator.model_dtype)
    return compat_layers.build_pools(configurator, _pool_class(settings), sizes, table)


def keep_chains(trees: tuple[Any, Any], *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
    """After ``NgramCorpus.batch_get``: let every request verify one chain."""
    from kvarn.core.chains import longest_chains

    return longest_chains(*trees)


def create_backend(runner: Any) -> Any:
    """Create the attention backend of a model runner, and say once what is being served."""
    from kvarn.sglang_backend.backend import TileAttentionBackend
    from kvarn.sglang_backend.latents import LatentTileBackend
    from kvarn.sglang_backend.layered import LayeredAttentionBackend

    if compat_facts.drafts_ngrams():
        compat_hooks.add_hook(tables.NGRAM_DRAFTS, keep_chains, "after")
        compat_hooks.apply_hooks()
    if compat_facts.latent_dims(runner.model_config) is None:
        tiles = TileAttentionBackend(runner)
    else:
        tiles = LatentTileBackend(runner)
        compat_hooks.choose_latent_attention(tiles.expands)
    windows = compat_layers.window_backend(runner)
    if compat.is_first_rank():
        logger.info("%s", compat.banner(runner))
    return tiles if windows is None else LayeredAttentionBackend(tiles, windows)


def _asked_preset(name: object) -> Preset | None:
    if not isinstance(name, str) or not is_preset_name(name):
        return None
    preset = get_preset(name)
    compat.require_tested_version()
    return preset


def _check_loaded_model(configurator: Any) -> None:
    device, preset = DeviceFacts(configurator.device), get_preset(configurator.kv_cache_dtype_str)
    windows = {LayerKind.MODEL_DTYPE} if (configurator.sliding_window_size or -1) > 0 else set()
    reasons = _model_reasons(configurator.model_config, preset, device, windows)
    reasons += compat_layers.draft_model_reasons(configurator)
    if reasons:
        raise UnsupportedConfig(reasons)


def _model_reasons(config: Any, preset: Preset, device: DeviceFacts, loaded: Collection[LayerKind] = ()) -> list[str]:
    facts = compat_facts.facts_of_config(config)
    facts = replace(facts, kinds=facts.kinds.union(loaded))
    return unsupported_reasons(facts, preset, device, compat_layers.kept_beside(config), latents=True)


def _pool_class(settings: PoolSettings) -> type:
    from kvarn.sglang_backend.pool import TilePool

    return type(TilePool.__name__, (TilePool,), {"__module__": TilePool.__module__, "settings": settings})
