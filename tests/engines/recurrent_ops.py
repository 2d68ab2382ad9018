"""What SGLang computes with kernels in Qwen3-Next, in plain torch: its CPU kernels are not published.

One token after the other, in float32; states are read from and written to SGLang's own pool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import conv1d, silu, softplus

_NORM_EPSILON = 1e-6


def install() -> None:
    """Stand in for the operations that SGLang's backend of these layers imports."""
    import sgl_kernel.mamba
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.kernels.ops.elementwise import elementwise

    # Else these two launch Triton kernels.
    fused_norm_gate._use_cpu = True
    elementwise._launch_fused_gate_sigmoid_mul = gated_add
    operations = torch.ops.sgl_kernel
    operations.fused_rmsnorm_gated_cpu = gated_norm
    operations.fused_gdn_gating_cpu = gates
    operations.fused_sigmoid_gating_delta_rule_update_cpu = decode
    sgl_kernel.mamba.chunk_gated_delta_rule_cpu = extend
    sgl_kernel.mamba.causal_conv1d_fn_cpu = convolve
    sgl_kernel.mamba.causal_conv1d_update_cpu = convolve_rows


def gated_norm(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise rows, and scale them by a weight and a gate."""
    rows = x.float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return (rows * silu(gate.float())).to(x.dtype)


def gated_add(x: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, out: torch.Tensor, *, do_add: bool) -> None:
    """Write a shared expert's rows times their gate, or add them."""
    rows = (x.float() @ weight.float()).sigmoid()[:, None] * shared.float()
    out.copy_(rows + out.float() if do_add else rows)


def gates(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log decay and write strength, [1, tokens, heads] each."""
    decay = -a_log.float().exp() * softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def decode(**given: Any) -> torch.Tensor:
    """Advance the states of requests by one token each."""
    decay, strength = gates(given["A_log"], given["a"], given["b"], given["dt_bias"])
    rows = (given["q"], given["k"], given["v"], decay, strength)
    return _advance(*rows, given["initial_state_source"], given["initial_state_indices"], given["cu_seqlens"])


def extend(**given: Any) -> tuple[torch.Tensor, None, None]:
    """Advance the states of requests by any number of tokens."""
    rows = (given["q"], given["k"], given["v"], given["g"], given["beta"])
    out = _advance(*rows, given["initial_state"], given["initial_state_indices"], given["cu_seqlens"])
    return out, None, None


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    **_given: Any,
) -> torch.Tensor:
    """Convolve the rows of all requests, [channels, tokens], each after what its state holds."""
    outs = []
    for i, slot in enumerate(cache_indices.tolist()):
        rows = x[:, query_start_loc[i] : query_start_loc[i + 1]]
        before = conv_states[slot] if has_initial_state[i] else torch.zeros_like(conv_states[slot])
        outs.append(_convolved(torch.cat((before, rows), dim=1), weight, bias, conv_states[slot]))
    return torch.cat(outs, dim=1)


def convolve_rows(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    _activation: str,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """Convolve one row of every request, [requests, channels]."""
    outs = []
    for row, slot in zip(x, conv_state_indices.tolist(), strict=True):
        joined = torch.cat((conv_states[slot], row[:, None]), dim=1)
        outs.append(_convolved(joined, weight, bias, conv_states[slot])[:, 0])
    return torch.stack(outs)


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    out = silu(conv1d(x.float()[None], weight.float()[:, None], bias, groups=weight.shape[0])[0]).to(x.dtype)
    state.copy_(x[:, -state.shape[1] :])
    return out


def _advance(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """Apply the gated delta rule; states are [slots, heads, v channels, k channels]."""
    group = v.shape[2] // q.shape[2]
    q, k = (_normalised(x[0]).repeat_interleave(group, dim=1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    out = torch.empty_like(v)
    for i, slot in enumerate(slots.tolist()):
        state = states[slot].float()
        for t in range(int(starts[i]), int(starts[i + 1])):
            state = state * decay[0, t].exp()[:, None, None]
            change = (v[0, t].float() - torch.einsum("hvk,hk->hv", state, k[t])) * strength[0, t][:, None]
            state = state + torch.einsum("hv,hk->hvk", change, k[t])
            out[0, t] = torch.einsum("hvk,hk->hv", state, q[t])
        states[slot] = state
    return out


def _normalised(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPSILON)
