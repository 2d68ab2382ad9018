"""torch's scaled_dot_product_attention over contiguous K and V, with the flash and the cuDNN backend.

One query row a request is written in two ways, of which the faster counts: query heads as rows of their kv head, and
the native GQA. Requests of different lengths take one call for each length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.gate import checked_requests, dense_expected, relative_rms, token_rows
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import TOLERANCE
from benchmarks.kernels.peers.registry import CannotRun
from benchmarks.kernels.timing import copies_needed

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests of one length: K and V of one copy are [requests, kv_heads, length, head_dim]."""

    requests: list[int]
    length: int


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield SDPA in every formulation; see `registry.operations`."""
    case = inputs.case
    if case.logit_cap:
        raise CannotRun("SDPA has no logit cap")
    groups = [
        _Group([i for i, other in enumerate(case.seq_lens) if other == length], length)
        for length in dict.fromkeys(case.seq_lens)
    ]
    read = 2 * sum(case.seq_lens) * case.kv_heads * case.head_dim * inputs.q.element_size()
    copies = 1 if hollow else copies_needed(read, l2_bytes)
    caches = [[_filled(inputs, group) for group in groups] for _ in range(copies)]
    queries = [_grouped_queries(inputs, group) for group in groups]
    for backend in _BACKENDS:
        for layout in ("rows", "gqa") if case.q_len == 1 else ("gqa",):
            yield _operation(inputs, groups, queries, caches, backend, layout)


def _operation(
    inputs: Inputs, groups: list[_Group], queries: list[torch.Tensor], caches: list, backend: str, layout: str
) -> Operation:
    case = inputs.case
    forward = _as_rows if layout == "rows" else _as_gqa

    def attend(copy: int) -> list[torch.Tensor]:
        with sdpa_kernel(_BACKENDS[backend]):
            return [forward(q, k, v, inputs.scale) for q, (k, v) in zip(queries, caches[copy], strict=True)]

    def error() -> float:
        out = torch.empty_like(inputs.q)
        for group, part in zip(groups, attend(0), strict=True):
            # [requests, q_heads, q_len, head_dim]
            out[token_rows(group.requests, case.q_len, out.device)] = part.transpose(1, 2).flatten(0, 1)
        return _error(inputs, groups, caches[0], out)

    return Operation(f"sdpa-{backend}-{layout}", len(caches), lambda copy: attend(copy)[-1], error,
                     TOLERANCE[inputs.q.dtype])  # fmt: skip


def _grouped_queries(inputs: Inputs, group: _Group) -> torch.Tensor:
    """Return the group's queries, [requests, q_heads, q_len, head_dim], contiguous."""
    q_len = inputs.case.q_len
    rows = inputs.q[token_rows(group.requests, q_len, inputs.device)]
    return rows.unflatten(0, (-1, q_len)).transpose(1, 2).contiguous()


def _as_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend with the query heads of a kv head as its rows; right for one query row, which sees everything."""
    requests, q_heads, _, head_dim = q.shape
    rows = q.view(requests, k.shape[1], -1, head_dim)
    return scaled_dot_product_attention(rows, k, v, scale=scale).reshape(requests, q_heads, 1, head_dim)


def _as_gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend with grouped heads; several query rows are the last positions."""
    q_len, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = causal_lower_right(q_len, k.shape[2]) if q_len > 1 else None
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _filled(inputs: Inputs, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return contiguous K and V of one copy, random rows of the pools, a request at a time to save memory."""
    case = inputs.case
    shape = (len(group.requests), case.kv_heads, group.length, case.head_dim)
    k, v = (torch.empty(shape, dtype=inputs.q.dtype, device=inputs.device) for _ in range(2))
    for cache, pool in ((k, inputs.key_pool), (v, inputs.value_pool)):
        for request in cache:
            request.copy_(pool[inputs.pick(group.length)].transpose(0, 1))
    return k, v


def _error(inputs: Inputs, groups: list[_Group], caches: list, out: torch.Tensor) -> float:
    """Return the relative RMS error of an output over one copy, against float64."""
    q_len = inputs.case.q_len
    where = {request: (g, i) for g, group in enumerate(groups) for i, request in enumerate(group.requests)}
    requests = checked_requests(inputs.case.seq_lens)
    want = []
    for request in requests:
        g, i = where[request]
        k, v = (cache[i].transpose(0, 1) for cache in caches[g])
        want.append(dense_expected(inputs.q[token_rows([request], q_len, out.device)], k, v, inputs.scale))
    return relative_rms(out[token_rows(requests, q_len, out.device)], torch.cat(want))
