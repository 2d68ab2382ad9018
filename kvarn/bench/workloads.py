"""Workloads as data, and the runs of a client that they become at a scale, a capacity and a longest context."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.errors import KVarNError

_MIN_PROMPT_TOKENS = 16
_MIN_OUTPUT_TOKENS = 4
# Contexts of a slope may take this share of the baseline's cache, so that no request is preempted in it.
_SLOPE_CAPACITY_SHARE = 0.9
_SEEDS = 1 << 31


@dataclass(frozen=True, slots=True)
class Workload:
    """One load.

    Args:
        name: in rows and on the command line.
        input_tokens: tokens of a prompt; where `contexts` are given, nothing.
        output_tokens: tokens of an answer, whatever the model would stop at.
        requests: how many; 0 where `fills` decides.
        fills: how many times over the requests, or if they share prefixes these alone, would fill the baseline's cache.
        rate: requests a second; 0 sends all at once.
        concurrency: requests at once; 0 sets no limit.
        contexts: prompts of each of these lengths are measured apart, for the slope of inter-token latency.
        prefix_tokens: beginning of a prompt that it shares with the others of its session.
        turns: requests of a session, which are sent in arbitrary order among those of other sessions.
        about: what it shows, for documents.
    """

    name: str
    about: str
    input_tokens: int
    output_tokens: int
    requests: int = 0
    fills: float = 0
    rate: float = 0
    concurrency: int = 0
    contexts: tuple[int, ...] = ()
    prefix_tokens: int = 0
    turns: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a client: every request has the same lengths.

    Args:
        input_tokens: tokens of a prompt, its shared prefix among them.
        output_tokens: tokens of an answer.
        requests: how many.
        rate: requests a second; 0 sends all at once.
        concurrency: requests at once; 0 sets no limit.
        prefix_tokens: shared beginning of a session's prompts; 0 draws every prompt by itself.
        sessions: different shared beginnings.
        seed: of the prompts.
        cached: the prompts are to be in the cache before latency is measured.
    """

    input_tokens: int
    output_tokens: int
    requests: int
    rate: float
    concurrency: int
    prefix_tokens: int
    sessions: int
    seed: int
    cached: bool = False


_CONTEXTS = tuple(1024 * k for k in (1, 4, 16, 32, 64, 128))
_TABLE = (
    Workload("slope-1", "inter-token latency over context, one request", 0, 64, 1, concurrency=1, contexts=_CONTEXTS),
    Workload("slope-8", "inter-token latency over context, 8 requests", 0, 64, 8, concurrency=8, contexts=_CONTEXTS),
    Workload("burst", "16k in, 1k out, all at once, twice what the baseline holds", 16384, 1024, fills=2),
    Workload("burst-32k", "32k in, 1k out, all at once, twice what the baseline holds", 32768, 1024, fills=2),
    Workload(
        "replay",
        "sessions of four turns with shared prefixes of 8k, three times what the baseline holds",
        *(8448, 128),
        fills=3,
        concurrency=16,
        prefix_tokens=8192,
        turns=4,
    ),
    Workload("chat-1024-512", "1,024 in, 512 out, 8 requests a second", 1024, 512, 256, rate=8),
    Workload("chat-4096-256", "4,096 in, 256 out, 8 requests a second", 4096, 256, 256, rate=8),
    Workload("short", "128 in, 128 out, 64 at once", 128, 128, 512, concurrency=64),
)
WORKLOADS = {workload.name: workload for workload in _TABLE}
_GROUPS = {"slope": ("slope-1", "slope-8"), "all": tuple(WORKLOADS)}


def named(names: str) -> list[Workload]:
    """Return the workloads that a list with commas names; `slope` names both slopes, `all` everything.

    Raises:
        KVarNError: there is no such workload.
    """
    chosen: dict[str, Workload] = {}
    for asked in names.split(","):
        for name in _GROUPS.get(asked, (asked,)):
            if name not in WORKLOADS:
                raise KVarNError(f"There is no workload {name!r}; choose from {', '.join([*_GROUPS, *WORKLOADS])}.")
            chosen[name] = WORKLOADS[name]
    return list(chosen.values())


def runs(workload: Workload, scale: float, baseline_tokens: int, longest: int) -> list[Run]:
    """Return the runs that a workload consists of.

    Args:
        workload: the workload.
        scale: factor on lengths, and on numbers of requests where these don't follow from the capacity. Only 1
            measures the load that a workload's name says; less tries the machinery on a small machine.
        baseline_tokens: tokens that the baseline's cache holds, so that every cache dtype gets the same load.
        longest: most tokens of a request, its answer included.

    Raises:
        KVarNError: a request is longer than the model allows, or fewer than two contexts of a slope fit.
    """
    if workload.contexts:
        return _slope_runs(workload, scale, baseline_tokens, longest)
    prefix = _scaled(workload.prefix_tokens, scale, _MIN_PROMPT_TOKENS) if workload.prefix_tokens else 0
    own = _scaled(workload.input_tokens - workload.prefix_tokens, scale, _MIN_PROMPT_TOKENS)
    output = _scaled(workload.output_tokens, scale, _MIN_OUTPUT_TOKENS)
    _check_length(workload.name, prefix + own + output, longest)
    if workload.fills:
        sessions = math.ceil(workload.fills * baseline_tokens / (prefix or own + output))
    else:
        sessions = max(1, round(workload.requests * scale))
    return [
        Run(
            input_tokens=prefix + own,
            output_tokens=output,
            requests=sessions * workload.turns,
            rate=workload.rate,
            concurrency=workload.concurrency,
            prefix_tokens=prefix,
            sessions=sessions if prefix else 0,
            seed=_seed(workload.name, 0),
        )
    ]


def slope(contexts: Sequence[float], latencies_ms: Sequence[float]) -> float:
    """Return the slope of latency over context by least squares, in us per 1,000 tokens.

    Args:
        contexts: tokens, at least two different numbers.
        latencies_ms: the latency at each, in milliseconds.
    """
    middle, level = (sum(values) / len(values) for values in (contexts, latencies_ms))
    spread = sum((context - middle) ** 2 for context in contexts)
    together = sum((x - middle) * (y - level) for x, y in zip(contexts, latencies_ms, strict=True))
    return together / spread * 1e6


def _slope_runs(workload: Workload, scale: float, baseline_tokens: int, longest: int) -> list[Run]:
    output = _scaled(workload.output_tokens, scale, _MIN_OUTPUT_TOKENS)
    room = min(longest, int(_SLOPE_CAPACITY_SHARE * baseline_tokens / workload.concurrency)) - output
    contexts = sorted({_scaled(context, scale, _MIN_PROMPT_TOKENS) for context in workload.contexts})
    fitting = [context for context in contexts if context <= room]
    if len(fitting) < 2:
        raise KVarNError(
            f"Workload {workload.name} needs two contexts of {contexts}, and {len(fitting)} fit: the model takes "
            f"{longest} tokens, the baseline's cache {baseline_tokens} for {workload.concurrency} requests; "
            "give the cache more memory or lower --scale."
        )
    return [
        Run(
            input_tokens=context,
            output_tokens=output,
            requests=workload.requests,
            rate=0,
            concurrency=workload.concurrency,
            prefix_tokens=0,
            sessions=0,
            seed=_seed(workload.name, index),
            # Else the first answers would be written while the last prompts are read.
            cached=workload.requests > 1,
        )
        for index, context in enumerate(fitting)
    ]


def _scaled(tokens: int, scale: float, least: int) -> int:
    return max(least, round(tokens * scale))


def _check_length(name: str, tokens: int, longest: int) -> None:
    if tokens > longest:
        raise KVarNError(
            f"Workload {name} has requests of {tokens} tokens, and the model or server takes {longest}; name other "
            "workloads, raise the server's limit or lower --scale."
        )


def _seed(name: str, index: int) -> int:
    """Return a seed of its own, so that no prompt is found in the cache because another workload left it there."""
    return zlib.crc32(f"{name}-{index}".encode()) % _SEEDS
