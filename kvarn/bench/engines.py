"""What differs between engines: how a server is started, what it tells of itself, and how its client is called."""

from __future__ import annotations

import json
import os
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvarn import env
from kvarn.bench.server import ServerError, call, metrics
from kvarn.bench.workloads import Run


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a server tells of itself.

    Args:
        engine: name and version.
        model: under which name it serves the model.
        dtype: cache dtype.
        tokens: tokens that its cache holds.
        longest: most tokens of a request; None if it is not told.
        ranks: ranks that share the kv heads.
        raw_bytes: bytes of a number in the model's dtype.
        requests: requests at once, whose exact tails are allocated apart from the tokens; None if they come out of
            the tokens.
        gib: memory of the cache; None if it is not told.
    """

    engine: str
    model: str
    dtype: str
    tokens: int
    longest: int | None = None
    ranks: int = 1
    raw_bytes: int = 2
    requests: int | None = None
    gib: float | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server has counted since it started.

    Args:
        hit_tokens: prompt tokens found in the cache.
        prompt_tokens: prompt tokens looked up.
        preemptions: times that a running request had to give up its place (SGLang says retracted).
    """

    hit_tokens: float
    prompt_tokens: float
    preemptions: float

    def since(self, before: Counters) -> Counters:
        """Return what was counted after `before`."""
        return Counters(
            self.hit_tokens - before.hit_tokens,
            self.prompt_tokens - before.prompt_tokens,
            self.preemptions - before.preemptions,
        )


@dataclass(frozen=True, slots=True)
class ClientReport:
    """What a benchmark client measured in one run.

    Args:
        completed: requests that were answered whole.
        output_tokens: tokens of all answers.
        duration_s: from the first request to the last answer.
        ttft_p50_ms: time to first token: median.
        ttft_p99_ms: 99th percentile.
        itl_p50_ms: latency between tokens: median.
        itl_p99_ms: 99th percentile.
    """

    completed: int
    output_tokens: int
    duration_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


_REPORTED = {
    "completed": "completed",
    "output_tokens": "total_output_tokens",
    "duration_s": "duration",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}


class Engine(ABC):
    """An engine's server and client."""

    name: ClassVar[str]
    server_module: ClassVar[str]
    """What ``python -m`` runs."""
    model_flag: ClassVar[str]
    metrics_flags: ClassVar[tuple[str, ...]]
    """Without them the server counts nothing."""
    cpu_flags: ClassVar[tuple[str, ...]]
    """Without a GPU: float32, because 16-bit maths is slow on CPUs, and limits on memory."""
    cpu_environment: ClassVar[dict[str, str]]

    def command(self, model: str, kv_cache_dtype: str, host: str, port: int, *, cuda: bool) -> list[str]:
        """Return the command that starts the server; KVarN itself gets no flag but the cache dtype."""
        command = [sys.executable, "-m", self.server_module, self.model_flag, model, "--kv-cache-dtype", kv_cache_dtype]
        return [*command, "--host", host, "--port", str(port), *(() if cuda else self.cpu_flags)]

    def environment(self, model: str, *, cuda: bool) -> dict[str, str]:
        """Return the environment of server and client: this one, and what the engine needs without a GPU."""
        environment = {**env.inherited(), "PYTHONUNBUFFERED": "1"}
        if Path(model).is_dir():
            environment.setdefault("HF_HUB_OFFLINE", "1")
        if not cuda:
            environment.update(self.cpu_environment)
            # One core stays free for the other processes; threads of torch that wait for one slow it down by far more.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        return environment

    @abstractmethod
    def facts(self, url: str) -> CacheFacts:
        """Ask a server what its cache holds."""

    @abstractmethod
    def counters(self, exposition: str) -> Counters:
        """Return what a server counted, from what it tells Prometheus."""

    @abstractmethod
    def client(self, run: Run, url: str, model: str, out: Path) -> list[str]:
        """Return the command of the engine's own benchmark client, which writes its figures to a file."""

    def report(self, out: Path) -> ClientReport:
        """Return what a client wrote.

        Raises:
            ServerError: it wrote nothing, or not what is expected of it.
        """
        try:
            said: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
            return ClientReport(**{ours: said[theirs] for ours, theirs in _REPORTED.items()})
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ServerError(
                f"The client of {self.name} left no figures in {out} ({type(error).__name__}: {error}); its log has "
                "the cause. All requests failed, or its version writes other names."
            ) from error


class SGLang(Engine):
    """SGLang."""

    name = "sglang"
    server_module = "sglang.launch_server"
    model_flag = "--model-path"
    metrics_flags = ("--enable-metrics",)
    cpu_flags = (
        *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "65536"),
        *("--max-running-requests", "8"),
    )
    cpu_environment = {"SGLANG_USE_CPU_ENGINE": "1"}

    def facts(self, url: str) -> CacheFacts:
        """Ask a server what its cache holds."""
        info = call(f"{url}/server_info")
        state: dict[str, Any] = info["internal_states"][0]
        return CacheFacts(
            engine=f"SGLang {info['version']}",
            model="default",
            dtype=info["kv_cache_dtype"],
            tokens=info["max_total_num_tokens"],
            longest=call(f"{url}/v1/models")["data"][0].get("max_model_len"),
            ranks=info["tp_size"],
            raw_bytes=4 if info["dtype"] == "float32" else 2,
            requests=state["effective_max_running_requests_per_dp"],
            gib=state["memory_usage"]["kvcache"],
        )

    def counters(self, exposition: str) -> Counters:
        """Return what a server counted; a counter appears when it first counts something."""
        return Counters(
            total(exposition, "sglang:cached_tokens_total"),
            total(exposition, "sglang:prompt_tokens_total"),
            total(exposition, "sglang:num_retracted_requests_total"),
        )

    def client(self, run: Run, url: str, model: str, out: Path) -> list[str]:
        """Return the command of the client."""
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
        # Without it the client draws prompts as text, which has other lengths when the server reads it.
        command += ["--model", model, "--tokenize-prompt", "--warmup-requests", "0", "--seed", str(run.seed)]
        if run.prefix_tokens:
            command += [
                *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(run.sessions)),
                *("--gsp-prompts-per-group", str(run.requests // run.sessions)),
                *("--gsp-system-prompt-len", str(run.prefix_tokens)),
                *("--gsp-question-len", str(run.input_tokens - run.prefix_tokens)),
                *("--gsp-output-len", str(run.output_tokens)),
                # Unlike random-ids, a ratio of 1 is every length as asked for. The header, which the server ignores,
                # keeps the client from reading prompts of another tokenizer from a cache in the home directory.
                *("--gsp-range-ratio", "1.0", "--gsp-send-routing-key"),
            ]
        else:
            command += [
                *("--dataset-name", "random-ids", "--random-range-ratio", "1.0"),
                *("--random-input-len", str(run.input_tokens), "--random-output-len", str(run.output_tokens)),
                *("--num-prompts", str(run.requests)),
            ]
        return [*command, *_pace(run), "--disable-tqdm", "--output-file", str(out)]


class VLLM(Engine):
    """vLLM."""

    name = "vllm"
    # `vllm serve`, which on CPU builds looks for a distribution of another name.
    server_module = "vllm.entrypoints.openai.api_server"
    model_flag = "--model"
    metrics_flags = ()
    cpu_flags = (
        *("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 29)),
    )
    cpu_environment = {"VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1"}

    def facts(self, url: str) -> CacheFacts:
        """Ask a server what its cache holds."""
        served = call(f"{url}/v1/models")["data"][0]
        cache = next(line for line in metrics(url).splitlines() if line.startswith("vllm:cache_config_info{"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', cache))
        return CacheFacts(
            engine=f"vLLM {call(f'{url}/version')['version']}",
            model=served["id"],
            dtype=labels["cache_dtype"],
            tokens=int(labels["kv_cache_size_tokens"]),
            longest=served.get("max_model_len"),
        )

    def counters(self, exposition: str) -> Counters:
        """Return what a server counted."""
        return Counters(
            total(exposition, "vllm:prefix_cache_hits_total"),
            total(exposition, "vllm:prefix_cache_queries_total"),
            total(exposition, "vllm:num_preemptions_total"),
        )

    def client(self, run: Run, url: str, model: str, out: Path) -> list[str]:
        """Return the command of the client."""
        command = [sys.executable, "-m", "kvarn.bench.vllm_client", "--backend", "vllm"]
        command += ["--base-url", url, "--model", model, "--seed", str(run.seed), "--num-warmups", "0"]
        if run.prefix_tokens:
            command += [
                *("--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", str(run.sessions)),
                *("--prefix-repetition-prefix-len", str(run.prefix_tokens)),
                *("--prefix-repetition-suffix-len", str(run.input_tokens - run.prefix_tokens)),
                *("--prefix-repetition-output-len", str(run.output_tokens)),
            ]
        else:
            command += [
                *("--dataset-name", "random", "--random-range-ratio", "0.0"),
                *("--random-input-len", str(run.input_tokens), "--random-output-len", str(run.output_tokens)),
            ]
        command += ["--num-prompts", str(run.requests), "--ignore-eos", "--temperature", "0", *_pace(run)]
        return [
            *command,
            "--disable-tqdm",
            "--save-result",
            "--result-dir",
            str(out.parent),
            "--result-filename",
            out.name,
        ]


def total(exposition: str, name: str) -> float:
    """Return the sum of a metric over its labels, in Prometheus' text format; 0 if it is not there."""
    samples = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)", exposition, re.MULTILINE)
    return sum(map(float, samples))


def _pace(run: Run) -> list[str]:
    rate = ["--request-rate", str(run.rate)] if run.rate else []
    return [*rate, *(["--max-concurrency", str(run.concurrency)] if run.concurrency else [])]


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (SGLang(), VLLM())}
