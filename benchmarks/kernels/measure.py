"""Measure one case: the gate, then KVarN's time, then its peers', in one flat row."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.cases import Case
from benchmarks.kernels.inputs import POOL_TILES, Inputs, make_inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.registry import KINDS, CannotRun, Peer, operations
from benchmarks.kernels.timing import Timer, Timing
from benchmarks.kernels.workload import TABLE_TOKENS, build

_TIMES = (
    "us", "us_p10", "us_p90", "replays", "rotate_us", "seal_us", "attend_us", "step_us", "layers", "packed_bytes",
    "packed_tbps", "of_limit", "rel_err", "gate_err", "vs_q_len_1",
)  # fmt: skip
_PEER_KEYS = ("us", "peer", "rel_err", "note")


class DeviceLost(Exception):
    """The GPU's context is broken: nothing more can run in this process."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases share.

    Args:
        device: where to run.
        timer: how to time.
        l2_bytes: size of the L2.
        limit_tbps: read bandwidth of this run.
        peers: what to compare with.
        table_tokens: tokens that page tables are wide enough for.
        pool_tiles: distinct tiles that caches are filled with.
    """

    device: torch.device
    timer: Timer
    l2_bytes: int
    limit_tbps: float
    peers: Sequence[Peer]
    table_tokens: int = TABLE_TOKENS
    pool_tiles: int = POOL_TILES


def empty_row(case: Case, bench: Bench) -> dict[str, Any]:
    """Return a case's row with everything that is measured still null."""
    return {
        "case": case.name,
        "preset": case.preset,
        "batch": case.batch,
        "shape": case.shape,
        "context": max(case.contexts),
        "tokens": sum(case.seq_lens),
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "q_len": case.q_len,
        "dtype": case.dtype,
        "logit_cap": case.logit_cap,
        "sealing": case.sealing,
        "table_tokens": bench.table_tokens,
        "limit_tbps": bench.limit_tbps,
        **dict.fromkeys(_TIMES),
        **{f"{kind}_{key}": None for kind in KINDS for key in _PEER_KEYS},
        **{f"vs_{kind}": None for kind in KINDS},
        "peers_missing": "",
        "failed": "",
        "bars": "",
    }


def measure_case(case: Case, bench: Bench, row: dict[str, Any]) -> None:
    """Fill a case's row. A failure is told in it, not raised.

    Args:
        case: the shape.
        bench: what all cases share.
        row: `empty_row`; filled as far as things go.

    Raises:
        DeviceLost: the GPU's context is broken.
    """
    try:
        inputs = make_inputs(case, bench.device, bench.pool_tiles)
        _measure_own(inputs, bench, row)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other cases are still to be measured)
        row["failed"] = _reason(error)
        _check_device(bench.device, row["failed"])
    if row["us"] is None:
        return
    missing = []
    for peer in bench.peers:
        missing += _measure_peer(peer, inputs, bench, row)
        _release(bench.device)
    row["peers_missing"] = "; ".join(missing)
    for kind in KINDS:
        if row[f"{kind}_us"] is not None:
            row[f"vs_{kind}"] = row[f"{kind}_us"] / row["us"]


def _measure_own(inputs: Inputs, bench: Bench, row: dict[str, Any]) -> None:
    """Check KVarN's output, then time it: one layer, and the step that all layers share."""
    workload = build(inputs, bench.l2_bytes, bench.table_tokens)
    check = workload.check()
    row.update(rel_err=check.error, gate_err=check.own_error, layers=len(workload.layers))
    if not check.passed:
        row["failed"] = f"relative RMS error {check.own_error:.2e} against float64"
        return
    timing = bench.timer(workload.run, len(workload.layers))
    packed = workload.traffic.total
    row.update(_times(timing), packed_bytes=packed, packed_tbps=packed / timing.us / 1e6)
    row["of_limit"] = row["packed_tbps"] / bench.limit_tbps
    for name, part in workload.parts().items():
        row[f"{name}_us"] = bench.timer(part, len(workload.layers)).us
    if workload.step.rows_in_ring:
        row["step_us"] = bench.timer(workload.build_step, 1).us


def _times(timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "us_p10": timing.us_p10, "us_p90": timing.us_p90, "replays": timing.replays}


def _measure_peer(peer: Peer, inputs: Inputs, bench: Bench, row: dict[str, Any]) -> list[str]:
    """Time every formulation of a peer, and let the fastest right one of its kind stand. Return what is missing."""
    missing: list[str] = []
    try:
        for operation in operations(peer, inputs, bench.l2_bytes):
            missing += _measure_operation(operation, peer, bench, row)
    except CannotRun as error:
        missing.append(f"{peer.name}: {error}")
    except Exception as error:  # noqa: BLE001 (a peer's code may raise anything)
        missing.append(f"{peer.name}: {_reason(error)}")
        _check_device(bench.device, missing[-1])
    return missing


def _measure_operation(operation: Operation, peer: Peer, bench: Bench, row: dict[str, Any]) -> list[str]:
    try:
        error = operation.error()
        if not error <= operation.tolerance:
            return [f"{operation.name}: relative RMS error {error:.2e} above {operation.tolerance:g}"]
        us = bench.timer(operation.run, operation.copies).us
    except Exception as problem:  # noqa: BLE001 (a peer's code may raise anything)
        reason = f"{operation.name}: {_reason(problem)}"
        _check_device(bench.device, reason)
        return [reason]
    best = row[f"{peer.kind}_us"]
    if best is None or us < best:
        name = f"{operation.name} ({peer.installed} {_version(peer.installed)})"
        values = dict(zip(_PEER_KEYS, (us, name, error, operation.note), strict=True))
        row.update({f"{peer.kind}_{key}": value for key, value in values.items()})
    return []


@functools.cache
def _version(package: str | None) -> str:
    """Return the version of an import package, as its distribution says."""
    names = importlib.metadata.packages_distributions().get(package or "", ["?"])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _reason(error: Exception) -> str:
    """Return what an exception says, in one line without the semicolon that separates reasons."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace(";", ",")


def _check_device(device: torch.device, reason: str) -> None:
    """Raise DeviceLost if the GPU no longer answers after a failure."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(reason) from error


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
