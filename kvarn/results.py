"""Result files: provenance and rows, one flat object a row, units in the key names."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvarn import env


def provenance(engine: str | None = None) -> dict[str, str]:
    """Return where and how figures were made."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "commit": env.commit() or _output("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "engine": f"{engine} {_version(engine)}" if engine else "none",
        "command": shlex.join([*env.modes(), "python", "-m", _module(), *map(without_folder, sys.argv[1:])]),
    }


def write(path: Path, rows: list[dict[str, Any]], engine: str | None = None) -> None:
    """Write a result file, whole or not at all, so that a run that is killed leaves the rows that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps({"provenance": provenance(engine), "rows": rows}, indent=1) + "\n")
    beside.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file; none if there is no such file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def without_folder(argument: str) -> str:
    """Return an argument as anyone may repeat it: an absolute path is only where one machine keeps a file."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _driver() -> str:
    """Return the driver's version, told once whatever the number of GPUs."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
