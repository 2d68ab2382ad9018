"""Timing: CUDA graph replays over as many copies of a cache as the L2 can't hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

# What a graph reads between two visits of the same bytes, in sizes of the L2.
L2_MULTIPLE = 3
# Events cost a few microseconds a replay: a graph this long hides them.
_GRAPH_MS = 2.0
_MAX_ROUNDS = 16
_TARGET_MS = 40.0
_MIN_REPLAYS, _MAX_REPLAYS = 15, 60
_WARM_REPLAYS = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one operation over the replays: median, 10th and 90th percentile."""

    us: float
    us_p10: float
    us_p90: float
    replays: int


# Times `run(copy)`, given how many copies there are.
Timer = Callable[[Callable[[int], object], int], Timing]


def copies_needed(bytes_read: int, l2_bytes: int) -> int:
    """Return how many copies of a working set are more than the L2 can keep.

    Args:
        bytes_read: bytes that one operation reads of one copy.
        l2_bytes: size of the L2.
    """
    return max(1, math.ceil(L2_MULTIPLE * l2_bytes / bytes_read))


def graph_timer(run: Callable[[int], object], copies: int) -> Timing:
    """Capture all copies, one after the other, in one graph, and time its replays.

    Args:
        run: launches the operation on one copy; makes no host synchronisation.
        copies: copies of the cache.
    """
    rounds = _rounds(run, copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for copy in range(copies):
                run(copy)
    for _ in range(_WARM_REPLAYS):
        graph.replay()
    (estimate,) = _replay_ms(graph, 1)
    replays = min(_MAX_REPLAYS, max(_MIN_REPLAYS, round(_TARGET_MS / estimate)))
    samples = [1e3 * ms / (rounds * copies) for ms in _replay_ms(graph, replays)]
    return summary(samples)


def summary(samples: list[float]) -> Timing:
    """Return the percentiles of at least two samples, in microseconds."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def _rounds(run: Callable[[int], object], copies: int) -> int:
    """Compile and warm up on a stream of its own, as captures want it; return how often the graph visits each copy."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        run(0)
        begin.record()
        for copy in range(copies):
            run(copy)
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return min(_MAX_ROUNDS, max(1, math.ceil(_GRAPH_MS / begin.elapsed_time(end))))


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(replays)]
    for begin, end in pairs:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]
