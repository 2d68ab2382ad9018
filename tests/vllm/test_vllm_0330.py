"""vLLM 0.33.0, which has no build for the CPU yet: its Python over the compiled library of the installed 0.32.0.

``KVARN_VLLM_0330`` names a folder that holds its ``vllm``, unpacked from its wheel::

    pip download --no-deps --only-binary :all: -d WHEEL vllm==0.33.0
    unzip -q WHEEL/vllm-0.33.0-*.whl 'vllm/*' -x '*.so' -d FOLDER
    KVARN_VLLM_0330=FOLDER python -m pytest tests/vllm/test_vllm_0330.py

The test lays links to that Python, links to the installed compiled files, and metadata whose version ends in ``+cpu``
(by which vLLM knows a build for the CPU) into a folder that comes first on PYTHONPATH. There is no other way to run
the part of vLLM that registers a plugin's cache dtypes officially.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ask_vllm import LENGTHS, Found
from compare import same_bits
from engine_process import Models
from processes import ask_elsewhere
from tiny_models import LLAMA_GROUP_3

VARIABLE = "KVARN_VLLM_0330"
# Read before this folder's fixture clears what would change the engines.
FOLDER = os.environ.get(VARIABLE)
TILE = 128


def _overlay(folder: Path) -> Path:
    """Make the overlay."""
    if not FOLDER:
        pytest.skip(f"{VARIABLE} names no folder with the Python of vLLM 0.33.0")
    package = Path(FOLDER, "vllm").resolve()
    if not package.is_dir():
        pytest.skip(f"{VARIABLE}={FOLDER} holds no vLLM")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(package, folder / "vllm", copy_function=os.symlink, ignore=shutil.ignore_patterns("*.so"))
    installed = importlib.util.find_spec("vllm")
    assert installed is not None and installed.origin is not None
    for library in Path(installed.origin).parent.glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library)
    metadata = folder / "vllm-0.33.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0+cpu\n")
    return folder


@pytest.fixture(scope="module")
def found(models: Models) -> Found:
    """Ask it what the other processes are asked."""
    folder = models.scratch("0330")
    overlay = _overlay(folder / "overlay")
    return ask_elsewhere(models.path(LLAMA_GROUP_3), folder, KVARN_CANONICAL="1", PYTHONPATH=str(overlay))


def test_the_newer_vllm_ran(found: Found) -> None:
    assert found.version.partition("+")[0] == "0.33.0"


@pytest.mark.parametrize("n", LENGTHS)
def test_hit_equals_the_cold_run(found: Found, n: int) -> None:
    cold, hit = found.answers[f"{n}/cold"], found.answers[f"{n}/hit"]
    assert cold.cached_tokens == 0
    assert hit.cached_tokens == (n - 1) // TILE * TILE
    same_bits(cold, hit)


def test_rings_of_started_and_resumed_requests_are_forgotten(found: Found) -> None:
    assert any(answer.retractions for answer in found.answers.values())
    assert found.forgotten == found.admitted
    assert sum(map(len, found.admitted)) > len(found.answers)


@pytest.mark.parametrize("file", ["test_vllm_latents.py", "test_vllm_learned_sinks.py"])
def test_tests_of_the_older_vllm_pass(models: Models, file: str) -> None:
    overlay = _overlay(models.scratch("0330-tests") / "overlay")
    path = os.pathsep.join([str(overlay), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
