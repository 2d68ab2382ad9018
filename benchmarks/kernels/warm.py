"""Compile ahead: every kernel variant of a run, in parallel processes, into the compilers' caches on disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from benchmarks.kernels.cases import Case
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.peers.registry import Peer, operations
from benchmarks.kernels.workload import build

_MAX_PROCESSES = 16


def compile_all(cases: Sequence[Case], peers: Sequence[Peer], table_tokens: int) -> list[str]:
    """Run every variant of KVarN's kernels and every peer that compiles in a process of its own, all at once.

    Args:
        cases: the cases of the run.
        peers: its peers.
        table_tokens: width of page tables, in tokens.

    Returns:
        The last words of each process that failed. Its kernels are compiled when they are measured.
    """
    variants: dict[Case, list[str]] = {}
    for case in cases:
        variants.setdefault(replace(case, contexts=(0,), sealing=False), []).append(case.name)
    compiling = [peer.name for peer in peers if peer.compiles and peer.installed]
    jobs = [["--peers", name, *(case.name for case in cases)] for name in compiling] + list(variants.values())
    command = [sys.executable, "-m", "benchmarks.kernels", "warm", "--table-tokens", str(table_tokens)]

    def run(job: list[str]) -> str:
        done = subprocess.run([*command, *job], capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else f"{job[:2]}: {done.stderr.strip()[-400:]}"

    with ThreadPoolExecutor(min(len(jobs), _MAX_PROCESSES, os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.map(run, jobs)))


def compile_own(cases: Sequence[Case], device: torch.device, table_tokens: int) -> None:
    """Launch KVarN's kernels once for each case, with the arguments of the real run, over hollow caches."""
    for case in cases:
        workload = build(make_inputs(case, device), 0, table_tokens, hollow=True)
        workload.run(0)


def compile_peers(cases: Sequence[Case], device: torch.device, peers: Sequence[Peer]) -> None:
    """Launch peers once for each case over hollow caches. What fails says why when it is measured."""
    for case in cases:
        inputs = make_inputs(case, device)
        for peer in peers:
            with contextlib.suppress(Exception):
                for operation in operations(peer, inputs, 0, hollow=True):
                    operation.run(0)
