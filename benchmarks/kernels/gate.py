"""The gate: an output's error against float64 over the same numbers, without which no time counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.bars import ERROR_BAR
from kvarn.core.append import rotate_rows_reference
from kvarn.core.attend import attend_reference
from kvarn.core.cache import LayerCache
from kvarn.core.reference import softmax_attention
from kvarn.core.step import Step

# Requests that are checked, and the tokens that they may have together beyond the longest one.
_MAX_REQUESTS = 4
_MAX_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class Check:
    """What the gate found.

    Args:
        error: relative RMS error against float64.
        rounding: the part of it that rounding a perfect output to its dtype makes.
    """

    error: float
    rounding: float

    @property
    def own_error(self) -> float:
        """The error without the rounding of the output, which is the model dtype's; NaN stays NaN."""
        return self.error if math.isnan(self.error) else math.sqrt(max(0.0, self.error**2 - self.rounding**2))

    @property
    def passed(self) -> bool:
        """Whether a time may be reported."""
        return self.own_error <= ERROR_BAR


def compare(got: torch.Tensor, want: torch.Tensor) -> Check:
    """Compare an output with the float64 result of the same shape."""
    return Check(relative_rms(got, want), relative_rms(want.to(got.dtype), want))


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return ||got - want|| / ||want|| in float64."""
    return float((got.double() - want).norm() / want.norm())


def checked_requests(seq_lens: tuple[int, ...]) -> list[int]:
    """Return the requests that are checked: the longest, the first, the last, as many as stay within bounds."""
    longest = max(range(len(seq_lens)), key=seq_lens.__getitem__)
    chosen, tokens = [longest], 0
    for request in dict.fromkeys((0, len(seq_lens) - 1, len(seq_lens) // 2)):
        fits = tokens + seq_lens[request] <= _MAX_TOKENS and len(chosen) < _MAX_REQUESTS
        if request != longest and fits:
            chosen.append(request)
            tokens += seq_lens[request]
    return sorted(chosen)


def token_rows(requests: list[int], q_len: int, device: torch.device) -> torch.Tensor:
    """Return the rows of some requests in the step's tensors, [requests * q_len], int64."""
    first = torch.tensor(requests, device=device)[:, None] * q_len
    return (first + torch.arange(q_len, device=device)).flatten()


def cache_expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, requests: list[int], q_len: int,
    scale: float, logit_cap: float,
) -> torch.Tensor:  # fmt: skip
    """Attend in float64 over a layer's records, ring and sinks, for some requests of a step.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; k, v: [tokens, kv_heads, head_dim]: the step's rows.
        layer: the layer's cache; in a decode step with the step's rows in the ring, in a chunk without.
        step: the forward pass; all its requests have q_len rows.
        requests: which requests.
        q_len: query rows a request.
        scale: factor on q . k.
        logit_cap: soft cap, 0 for none.

    Returns:
        [requests * q_len, q_heads, head_dim], float64.
    """
    tokens, part = step_of(step, requests, q_len)
    raw = rotate_rows_reference(k[tokens], v[tokens])
    return attend_reference(q[tokens].double(), raw, layer, part, scale, logit_cap)[0]


def step_of(step: Step, requests: list[int], q_len: int) -> tuple[torch.Tensor, Step]:
    """Return the rows of some requests of a step, and what a reference needs to know of the step that has only these.

    Args:
        step: the forward pass; all its requests have q_len rows.
        requests: which requests.
        q_len: query rows a request.
    """
    device, count = step.rows.device, len(requests)
    tokens = token_rows(requests, q_len, device)
    chosen = torch.tensor(requests, device=device)
    per_request = ("rows", "block_table", "prefix_lens", "seq_lens", "own_start", "sink_slots")
    part = replace(
        step,
        **{name: getattr(step, name)[chosen] for name in per_request},
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device) * q_len,
        token_request=torch.arange(count, dtype=torch.int32, device=device).repeat_interleave(q_len),
        token_position=step.token_position[tokens],
    )
    return tokens, part


def dense_expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, logit_cap: float = 0.0
) -> torch.Tensor:
    """Attend in float64 over one request's keys and values; the last query row sees all of them.

    Args:
        q: [rows, q_heads, head_dim], any dtype.
        k: [positions, kv_heads, head_dim], any dtype; v: the same shape.
        scale: factor on q . k.
        logit_cap: soft cap, 0 for none.

    Returns:
        [rows, q_heads, head_dim], float64.
    """
    rows, positions = q.shape[0], k.shape[0]
    last = torch.arange(positions - rows, positions, device=q.device)
    visible = torch.arange(positions, device=q.device)[None, :] <= last[:, None]
    return softmax_attention(q.double(), k.double(), v.double(), visible, scale, logit_cap)[0]
