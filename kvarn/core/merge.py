"""Merge: the attention of the same queries to two sets of keys, by their log-sum-exp."""

import torch

from kvarn.core.cache import runs_triton
from kvarn.core.launch import launch

_BLOCK_ELEMENTS = 2048


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge another part into a result, in place.

    Args:
        out: [queries, heads, head_dim], any float dtype, contiguous; written.
        lse: [heads, queries], float32, natural; queries are contiguous; written.
        part: [queries, heads, head_dim], contiguous.
        part_lse: as lse. No query of either saw nothing.

    Determinism: bitwise. Graph-safe: yes.
    """
    if not runs_triton(out):
        merge_reference(out, lse, part, part_lse)
        return
    from kvarn.core.kernels.merge import merge_kernel

    queries, heads, head_dim = out.shape
    padded = 1 << (head_dim - 1).bit_length()
    block = _BLOCK_ELEMENTS // padded
    launch(
        merge_kernel, (-(-queries * heads // block),),
        out, lse, part, part_lse, queries * heads, heads, lse.stride(0), part_lse.stride(0),
        D=head_dim, DP=padded, BLOCK=block,
    )  # fmt: skip


def merge_reference(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge in plain torch."""
    weight = torch.sigmoid(part_lse - lse).T[..., None]
    out.copy_(torch.lerp(out.float(), part.float(), weight))
    lse.copy_(torch.logaddexp(lse, part_lse))


def merge_sinks(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> None:
    """Merge a key of value zero into a result, in place: the sink of every head.

    Args:
        out: [queries, heads, head_dim], any float dtype, contiguous; written.
        lse: [heads, queries], float32, natural, of all other keys; queries are contiguous. Where it is -inf, out may
            hold anything.
        sink_logits: [heads], any float dtype, contiguous.

    Determinism: bitwise. Graph-safe: yes.
    """
    if not runs_triton(out):
        merge_sinks_reference(out, lse, sink_logits)
        return
    from kvarn.core.kernels.merge import merge_sinks_kernel

    queries, heads, head_dim = out.shape
    padded = 1 << (head_dim - 1).bit_length()
    block = _BLOCK_ELEMENTS // padded
    launch(
        merge_sinks_kernel, (-(-queries * heads // block),),
        out, lse, sink_logits, queries * heads, heads, lse.stride(0), D=head_dim, DP=padded, BLOCK=block,
    )  # fmt: skip


def merge_sinks_reference(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> None:
    """Merge sinks in plain torch."""
    weight = torch.sigmoid(lse - sink_logits.float()[:, None]).T[..., None]
    out.copy_(torch.where(weight > 0, out.float() * weight, 0.0))
