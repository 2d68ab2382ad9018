"""What SGLang computes with kernels in Qwen3-Next, in plain torch: its CPU kernels are not published.

One token after the other, in float32; states are read from and written to SGLang's own pool. Where drafts are verified,
the state after each of them is kept beside, and that of the last accepted one becomes the request's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import silu, softplus

_NORM_EPSILON = 1e-6


def install() -> None:
    """Stand in for the operations that SGLang's backend of these layers imports."""
    import sgl_kernel.mamba
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.kernels.ops.mamba import mamba_state_scatter_triton

    # Else these two launch Triton kernels.
    fused_norm_gate._use_cpu = True
    elementwise._launch_fused_gate_sigmoid_mul = gated_add
    # What drafts for Qwen3-Next waits for a GPU when it is loaded, on any device.
    torch.cuda.synchronize = lambda *_: None
    operations = torch.ops.sgl_kernel
    operations.fused_rmsnorm_gated_cpu = gated_norm
    operations.fused_gdn_gating_cpu = gates
    operations.fused_sigmoid_gating_delta_rule_update_cpu = decode
    sgl_kernel.mamba.chunk_gated_delta_rule_cpu = extend
    sgl_kernel.mamba.causal_conv1d_fn_cpu = convolve
    sgl_kernel.mamba.causal_conv1d_update_cpu = convolve_rows
    mamba_state_scatter_triton.scatter_mamba_states_after_mtp_verify = accept


def gated_norm(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise rows, and scale them by a weight and a gate."""
    rows = x.float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return (rows * silu(gate.float())).to(x.dtype)


def gated_add(x: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, out: torch.Tensor, *, do_add: bool) -> None:
    """Write a shared expert's rows times their gate, or add them."""
    # Looked up here, because tests compute it row by row.
    gate = functional.linear(x.float(), weight.float().view(1, -1))
    rows = gate.double().sigmoid().float() * shared.float()
    out.copy_(rows + out.float() if do_add else rows)


def gates(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log decay and write strength, [1, tokens, heads] each.

    In float64, because torch rounds the last few elements of a tensor differently from those before them.
    """
    decay = -a_log.double().exp() * softplus(a.double() + dt_bias.double())
    return decay.float()[None], b.double().sigmoid().float()[None]


def decode(**given: Any) -> torch.Tensor:
    """Advance the states of requests by one token each, or keep those after each of several tokens to be verified."""
    decay, strength = gates(given["A_log"], given["a"], given["b"], given["dt_bias"])
    rows = (given["q"], given["k"], given["v"], decay, strength)
    states = (given["initial_state_source"], given["initial_state_indices"], given["cu_seqlens"])
    if not given.get("disable_state_update"):
        return _advance(*rows, *states)
    return _advance(*rows, *states, (given["intermediate_states_buffer"], given["intermediate_state_indices"]))


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
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    **_trees: Any,
) -> torch.Tensor:
    """Convolve one row of every request, [requests, channels], or rows to be verified, [requests, channels, rows]."""
    out = torch.empty_like(x)
    for i, (rows, slot) in enumerate(zip(x, conv_state_indices.tolist(), strict=True)):
        state = conv_states[slot]
        joined = torch.cat((state, rows.view(x.shape[1], -1)), dim=1)
        if intermediate_conv_window is not None:
            windows = joined[:, 1:].unfold(1, state.shape[1], 1).transpose(0, 1)
            intermediate_conv_window[intermediate_state_indices[i], : windows.shape[0]] = windows
            state = state.clone()
        out[i] = _convolved(joined, weight, bias, state).view(rows.shape)
    return out


def accept(
    pool: Any,
    slots: torch.Tensor,
    last: torch.Tensor,
    tracked_slots: torch.Tensor | None,
    _tracked: torch.Tensor | None,
    **_given: Any,
) -> None:
    """Make the states after some of the verified rows those of their requests; states are [layers, slots, ...]."""
    if tracked_slots is not None:
        raise NotImplementedError("The stand-in keeps no states for the prefix cache.")
    pairs = [(pool.temporal, pool.intermediate_ssm), *zip(pool.conv, pool.intermediate_conv_window, strict=True)]
    for states, kept in pairs:
        for i, (slot, step) in enumerate(zip(slots.tolist(), last.tolist(), strict=True)):
            states[:, slot] = kept[:, i, step]


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    new = x.shape[1] - state.shape[1]
    out = torch.zeros(x.shape[0], new)
    for i, column in enumerate(weight.float().unbind(1)):
        out += x[:, i : i + new].float() * column[:, None]
    state.copy_(x[:, -state.shape[1] :])
    return silu(out if bias is None else out + bias.float()[:, None]).to(x.dtype)


def _advance(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Apply the gated delta rule; states are [slots, heads, v channels, k channels].

    With `kept`, states stay as they are; those after each row go to [rows of this, steps, ...], and which row is whose.
    """
    group = v.shape[2] // q.shape[2]
    q, k = (_normalised(x[0]).repeat_interleave(group, dim=1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    v = v.contiguous()
    out = torch.empty_like(v)
    for i, slot in enumerate(slots.tolist()):
        state = states[slot].float()
        for t in range(int(starts[i]), int(starts[i + 1])):
            state = state * decay[0, t].exp()[:, None, None]
            change = (v[0, t].float() - torch.einsum("hvk,hk->hv", state, k[t])) * strength[0, t][:, None]
            state = state + torch.einsum("hv,hk->hvk", change, k[t])
            out[0, t] = torch.einsum("hvk,hk->hv", state, q[t])
            if kept is not None:
                kept[0][kept[1][i], t - starts[i]] = state
        if kept is None:
            states[slot] = state
    return out


def _normalised(x: torch.Tensor) -> torch.Tensor:
    # Of one layout, so that a row's sum has the same bits in every step.
    x = x.float().contiguous()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPSILON)
