"""The peers that a case is compared with, by kind. What can't run says why, and is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation


@dataclass(frozen=True, slots=True)
class Peer:
    """An implementation to compare with.

    Args:
        name: what `--peers` calls it.
        kind: whose time it may set: ``fp16`` (the model dtype), ``fp8`` or ``turboquant``.
        module: file of this folder; its `operations(inputs, l2_bytes, kind, hollow)` makes it ready.
        packages: any of these must be installed.
        compiles: whether kernels are compiled at first use and kept on disk.
    """

    name: str
    kind: str
    module: str
    packages: tuple[str, ...]
    compiles: bool = True

    @property
    def installed(self) -> str | None:
        """The first of its packages that is there."""
        return next((name for name in self.packages if importlib.util.find_spec(name)), None)


KINDS = ("fp16", "fp8", "turboquant")
PEERS = (
    Peer("sdpa", "fp16", "sdpa", ("torch",), compiles=False),
    Peer("flashinfer-fp16", "fp16", "flashinfer_paged", ("flashinfer",)),
    Peer("flashinfer-fp8", "fp8", "flashinfer_paged", ("flashinfer",)),
    Peer("fa3-fp16", "fp16", "flash_attention3", ("sgl_kernel", "vllm"), compiles=False),
    Peer("fa3-fp8", "fp8", "flash_attention3", ("sgl_kernel", "vllm"), compiles=False),
    Peer("sglang-fp16", "fp16", "sglang_triton", ("sglang",)),
    Peer("sglang-fp8", "fp8", "sglang_triton", ("sglang",)),
    Peer("vllm-fp16", "fp16", "vllm_triton", ("vllm",)),
    Peer("vllm-fp8", "fp8", "vllm_triton", ("vllm",)),
    Peer("turboquant", "turboquant", "turboquant", ("vllm",)),
)


class CannotRun(Exception):
    """A peer has no way to compute a case: the message says why."""


def select(names: Sequence[str] | None) -> list[Peer]:
    """Return the peers of these names, all for None."""
    known = [peer.name for peer in PEERS]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"Unknown peers {', '.join(unknown)}: there are {', '.join(known)}.")
    return [peer for peer in PEERS if names is None or peer.name in names]


def operations(peer: Peer, inputs: Inputs, l2_bytes: int, *, hollow: bool = False) -> Iterator[Operation]:
    """Make a peer ready for a case, in every formulation that is worth timing; the fastest counts.

    Args:
        peer: which.
        inputs: rows and pools.
        l2_bytes: size of the L2, which sets the number of copies.
        hollow: few blocks stand for all, and one copy: for compiling.

    Raises:
        CannotRun: the peer has no such operation. Anything else comes from the peer's own code.
    """
    if not peer.installed:
        raise CannotRun(f"{' or '.join(peer.packages)} is not installed")
    module = importlib.import_module(f"benchmarks.kernels.peers.{peer.module}")
    yield from module.operations(inputs, l2_bytes, peer.kind, hollow)
