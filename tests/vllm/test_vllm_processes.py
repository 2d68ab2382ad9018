"""vLLM in processes of its own: the second model runner, other plugins, and the server that users start."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ask_vllm import Found, ask_everything
from compare import logprob_difference, same_bits
from engine_process import Models
from processes import DRIVER, TIMEOUT_S, ask_elsewhere, run, started
from serving import DTYPE, serving
from tiny_models import LLAMA_GROUP_3

TILE = 128
REFUSED = json.dumps(
    {
        "block_size": 64,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 64, "prompt_lookup_max": 3},
    }
)
STOCK = '{"kv_cache_dtype": "auto"}'
# The runners sample by kernels of their own. Measured: 2.4e-7.
ROUNDING = 1e-5
# A tokenizer of bytes: so many tokens.
PROMPT = "The quick brown fox jumps over the lazy dog. " * 7


@dataclass(frozen=True, slots=True)
class Served:
    """What the server answered to the same completion twice, and all that it said."""

    completions: list[dict[str, Any]]
    log: str


@dataclass(frozen=True, slots=True)
class Processes:
    """What came of each process.

    Args:
        second_runner: answers of the second model runner.
        no_plugins: answers with no plugin loaded and vLLM's own cache.
        other_plugins: exit code and output where our dtype was asked for and another plugin was loaded.
        refused: exit code and output where two things were asked for which can't be served.
        served: the server.
    """

    second_runner: Found
    no_plugins: Found
    other_plugins: tuple[int, str]
    refused: tuple[int, str]
    served: Served


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    said = "\n".join(log.read_text(errors="replace").splitlines()[-80:])
    raise RuntimeError(f"The server did not come up (exit code {process.poll()}):\n{said}")


def _serve(model: Path, folder: Path) -> Served:
    """Start a server as users do, in several processes, and ask it the same twice."""
    port, log = _free_port(), folder / "log.txt"
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--kv-cache-dtype", DTYPE]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--enable-prompt-tokens-details"]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "KVARN_CANONICAL": "1"}
    with started(command, log, **variables) as process:
        base = f"http://127.0.0.1:{port}"
        _wait(f"{base}/health", process, log)
        body = {"model": str(model), "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        completions = [_post(f"{base}/v1/completions", body) for _ in range(2)]
    return Served(completions, log.read_text(errors="replace"))


@pytest.fixture(scope="module")
def processes(models: Models) -> Processes:
    """Run all of them, two at a time."""
    model = models.path(LLAMA_GROUP_3)

    def scratch(name: str) -> Path:
        folder = models.scratch(name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def asked(name: str, options: str = "{}") -> tuple[list[str], Path]:
        """Return a command that is to fail, and where its output goes."""
        folder = scratch(name)
        return [str(DRIVER), str(model), str(folder / "results.json"), options], folder / "log.txt"

    with ThreadPoolExecutor(max_workers=2) as pool:
        served = pool.submit(_serve, model, scratch("server"))
        second = pool.submit(
            ask_elsewhere, model, scratch("second-runner"), KVARN_CANONICAL="1", VLLM_USE_V2_MODEL_RUNNER="1"
        )
        none = pool.submit(ask_elsewhere, model, scratch("no-plugins"), STOCK, VLLM_PLUGINS="")
        other = pool.submit(run, *asked("other-plugins"), VLLM_PLUGINS="other")
        # In a process of its own, because vLLM's n-gram drafts spoil every later engine of theirs.
        refusal = pool.submit(run, *asked("refused", REFUSED))
        return Processes(second.result(), none.result(), other.result(), refusal.result(), served.result())


def test_server_answers_and_hits_its_prefix_cache(processes: Processes) -> None:
    first, second = processes.served.completions
    assert first["usage"]["completion_tokens"] == 8
    assert first["choices"][0]["text"] == second["choices"][0]["text"] != ""
    cached = [(answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0) for answer in (first, second)]
    assert cached == [0, (len(PROMPT) - 1) // TILE * TILE]


def test_server_says_once_what_it_serves(processes: Processes) -> None:
    lines = [line for line in processes.served.log.splitlines() if "KVarN" in line]
    assert len(lines) == 1
    assert "in vLLM 0.32.0: kvarn_k4v2_g128 (format kvarn3-" in lines[0]
    assert "224 bytes a token" in lines[0]


def test_every_reason_is_listed_before_weights_are_loaded(processes: Processes) -> None:
    code, said = processes.refused
    assert code > 0
    assert "kvarn.errors.UnsupportedConfig: KVarN can't serve this configuration:" in said
    assert "--block-size 64 is not a multiple of the tile of 128 tokens; leave the flag out." in said
    assert "--speculative-config with num_speculative_tokens 64 can't be used, because a request's rows" in said
    assert "Loading weights took" not in said


def test_second_model_runner_answers_as_the_first(
    models: Models, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARN_CANONICAL", "1")
    second, first = processes.second_runner, ask_everything(models.path(LLAMA_GROUP_3))
    assert first.runner == "vllm.v1.worker.gpu_model_runner"
    assert second.runner == "vllm.v1.worker.gpu.model_runner"
    assert second.answers.keys() == first.answers.keys()
    for name, answer in second.answers.items():
        assert answer.output_ids == first.answers[name].output_ids
        assert answer.cached_tokens == first.answers[name].cached_tokens
        assert logprob_difference(answer, first.answers[name]) < ROUNDING


def test_second_model_runner_was_preempted_and_hit_its_cache(processes: Processes) -> None:
    """What the tests of it rest on."""
    answers = processes.second_runner.answers
    assert any(answer.retractions for answer in answers.values())
    assert answers["300/hit"].cached_tokens == 2 * TILE
    same_bits(answers["300/hit"], answers["300/cold"])


def test_second_model_runner_forgets_rings_of_started_and_resumed_requests(processes: Processes) -> None:
    """It is told of a resumed request as of a new one."""
    second = processes.second_runner
    assert second.forgotten == second.admitted
    assert sum(map(len, second.admitted)) > len(second.answers)


def test_without_a_kvarn_dtype_nothing_of_ours_is_active(
    models: Models, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvarn.vllm_backend import compat

    def called() -> None:
        raise AssertionError("KVarN was asked for a layer of the stock cache")

    # What choosing our backend begins with.
    monkeypatch.setattr(compat, "require_compatible", called)
    model = models.path(LLAMA_GROUP_3)
    with serving(model, **json.loads(STOCK)) as engine:
        assert engine.tail is None
        layers = engine.config.compilation_config.static_forward_context.values()
        assert {layer.attn_backend.get_name() for layer in layers} == {"CPU_ATTN"}
        assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == 1
    stock = ask_everything(model, **json.loads(STOCK))
    assert stock.answers.keys() == processes.no_plugins.answers.keys()
    for name, answer in stock.answers.items():
        assert answer.output_ids == processes.no_plugins.answers[name].output_ids
        assert logprob_difference(answer, processes.no_plugins.answers[name]) < ROUNDING
    assert stock.forgotten == []


def test_dtype_of_a_plugin_that_is_not_loaded_is_refused_by_vllm(processes: Processes) -> None:
    code, said = processes.other_plugins
    assert code > 0
    assert "ValidationError: 1 validation error for CacheConfig" in said
    assert f"input_value='{DTYPE}'" in said
    assert "kvarn_k8v4_g128" not in said
