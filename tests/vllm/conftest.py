"""Real vLLM engines on the CPU, one after another in this process; tiny models, made once a session.

Everything here is skipped where vLLM is not installed or not built for the CPU. With pytest-xdist, ``--dist loadfile``
keeps two workers from running the same engines.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Helpers are imported by plain names; models, plans and comparisons are those of the SGLang tests.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engines")]
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

if TYPE_CHECKING:
    from engine_process import Models

_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    # Else vLLM pins this process, and what it starts, to cores that others may use as well.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The n-gram proposer's numba would set OpenMP's threads for every engine after it, where torch has set one.
    "NUMBA_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# What would change the engine under test; the interpreter of the kernel tests is too slow for a model.
_FOREIGN = ("KVARN_", "VLLM_", "TRITON_INTERPRET")


@pytest.fixture(scope="package", autouse=True)
def vllm_on_cpu() -> Iterator[None]:
    """Set the environment that vLLM reads, or skip where it can't run on the CPU."""
    # This folder alone makes find_spec("vllm") find something.
    if importlib.util.find_spec("vllm.version") is None:
        pytest.skip("vLLM is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
            patch.delenv(name)
        for name, value in _VARIABLES.items():
            patch.setenv(name, value)
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            pytest.skip("this vLLM is not built for the CPU")
        threads = torch.get_num_threads()
        # Threads that spin for each other make tiny models many times slower on cores that are shared.
        torch.set_num_threads(1)
        # vLLM replaces it for good.
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        # Done again, by the next engine, it stumbles over modules of numba, which the n-gram proposer imports.
        register = functools.cache(current_platform.register_triton_kernel_overrides)
        patch.setattr(type(current_platform), "register_triton_kernel_overrides", staticmethod(register))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch for fixtures that run an engine for a whole module."""
    with pytest.MonkeyPatch.context() as module_patch:
        yield module_patch


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Make the tiny models."""
    from engine_process import make_models

    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist share what is beside their own folders.
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return make_models(session / "vllm" / "models")
