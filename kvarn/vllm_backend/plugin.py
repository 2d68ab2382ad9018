"""vLLM's entry point of KVarN: adds our cache dtypes and selects our backend for layers that have one."""

from __future__ import annotations

from typing import Any

from kvarn.errors import UnsupportedConfig
from kvarn.presets import get_preset
from kvarn.vllm_backend import compat, compat_windows


def register() -> None:
    """Register KVarN with vLLM, in every process that loads plugins. Cheap, and may be called again.

    Versions are checked when a kvarn dtype is used, so that an installed KVarN never stops another configuration.
    """
    compat.add_dtypes()
    compat.add_backend()
    compat.select_backend_by(choose_backend)
    compat_windows.keep_windows_raw()


def choose_backend(platform: type, config: Any) -> str:
    """Return the path of our backend for a layer with a kvarn dtype.

    Raises:
        EngineIncompatible: this vLLM is not one that KVarN was tested with.
        UnsupportedConfig: lists every reason why the layer can't be served.
    """
    from kvarn.vllm_backend import backend, latent_backend

    compat.require_compatible()
    preset = get_preset(config.kv_cache_dtype)
    module = latent_backend if config.use_mla else backend
    reasons = getattr(module, preset.name).validate_configuration(
        device_capability=platform.get_device_capability(),
        **config._asdict(),
    )
    if reasons:
        raise UnsupportedConfig(reasons)
    return f"{module.__name__}.{preset.name}"
