"""Kernels with explicit layouts compile for a GPU with the Triton beside vLLM, too, which may not be SGLang's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kernels" / "compile_for_gpu.py"


@pytest.mark.parametrize(
    "case", ["kvarn_k4v2_g128/128/8", "kvarn_k4v2_g128/128/8/4/verify", "latent/explicit/16", "latent/groups/16"]
)
def test_kernel_compiles(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    command = [sys.executable, str(SCRIPT), case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[0])["case"] == case
