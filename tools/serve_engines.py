"""What differs between engines for tools/serve.py: command, environment, and what a server tells of itself."""

from __future__ import annotations

import os
import re
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_report import CacheFacts, call

TOOLS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    """An engine's server."""

    name: str
    module: str
    """What ``python -m`` runs."""
    model_flag: str
    cpu_flags: tuple[str, ...]
    """Without a GPU: float32, because 16-bit maths is slow on CPUs, and limits on memory."""
    cpu_environment: dict[str, str]
    facts: Callable[[str], CacheFacts]
    """Asks a server of that address."""

    def command(self, model: str, kv_cache_dtype: str, host: str, port: int, *, cuda: bool) -> list[str]:
        """Return the command that starts the server; KVarN itself gets no flag but the cache dtype."""
        command = [sys.executable, "-m", self.module, self.model_flag, model, "--kv-cache-dtype", kv_cache_dtype]
        return [*command, "--host", host, "--port", str(port), *(() if cuda else self.cpu_flags)]

    def environment(self, model: str, *, cuda: bool) -> dict[str, str]:
        """Return the server's environment: this one, and what the engine needs without a GPU."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if Path(model).is_dir():
            environment.setdefault("HF_HUB_OFFLINE", "1")
        if not cuda:
            environment.update(self.cpu_environment)
            # One core stays free for the other processes; threads of torch that wait for one slow it down by far more.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        return environment


def _sglang_facts(url: str) -> CacheFacts:
    info = call(f"{url}/server_info")
    state: dict[str, Any] = info["internal_states"][0]
    return CacheFacts(
        engine=f"SGLang {info['version']}",
        model="default",
        dtype=info["kv_cache_dtype"],
        tokens=info["max_total_num_tokens"],
        ranks=info["tp_size"],
        raw_bytes=4 if info["dtype"] == "float32" else 2,
        requests=state["effective_max_running_requests_per_dp"],
        gib=state["memory_usage"]["kvcache"],
    )


def _vllm_facts(url: str) -> CacheFacts:
    version = call(f"{url}/version")["version"]
    model = call(f"{url}/v1/models")["data"][0]["id"]
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    cache = next(line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', cache))
    return CacheFacts(
        engine=f"vLLM {version}",
        model=model,
        dtype=labels["cache_dtype"],
        tokens=int(labels["kv_cache_size_tokens"]),
    )


_SGLANG_PATHS = (str(TOOLS / "sglang_cpu"), os.environ.get("PYTHONPATH", ""))
SGLANG = Engine(
    name="sglang",
    module="sglang.launch_server",
    model_flag="--model-path",
    cpu_flags=("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "65536", "--max-running-requests", "8"),
    cpu_environment={
        # Stand-ins for what SGLang lacks without a GPU.
        "PYTHONPATH": os.pathsep.join(path for path in _SGLANG_PATHS if path),
        "SGLANG_USE_CPU_ENGINE": "1",
    },
    facts=_sglang_facts,
)
VLLM = Engine(
    name="vllm",
    # `vllm serve`, which on CPU builds looks for a distribution of another name.
    module="vllm.entrypoints.openai.api_server",
    model_flag="--model",
    cpu_flags=(
        *("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 29)),
    ),
    cpu_environment={"VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1"},
    facts=_vllm_facts,
)
ENGINES = {engine.name: engine for engine in (SGLANG, VLLM)}
