"""Real SGLang engines on the CPU, each in a process of its own; tiny models, made once a session."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Test modules and the driver import their helpers by plain names.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from engine_process import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Make the tiny models, or skip where no CPU engine can run."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    if torch.cuda.is_available():
        pytest.skip("with a GPU SGLang starts no CPU engine")
    from engine_process import make_models

    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist share what is beside their own folders, and so run no engine twice.
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return make_models(session / "engines" / "models")


# Modules that ask the same engine.
_SHARED = {"test_canonical_schedules": "schedules", "test_engine_drafts": "schedules"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep tests of one engine in one worker, or two would wait for it (``--dist loadgroup``, which begins with these).

    Tests in no group are handed out one by one after them, so that no worker is left with a long rest.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group(_SHARED.get(item.path.stem, item.path.stem)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured."""
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    measured = [pair for report in reports if getattr(report, "when", "") == "call" for pair in report.user_properties]
    if measured:
        terminalreporter.section("measured in engines")
    for name, value in measured:
        terminalreporter.write_line(f"{name}: {value}")
