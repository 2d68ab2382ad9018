"""Decode attention over latents in the model dtype, as SGLang ships it: Triton, FlashMLA and FlashAttention 3."""

from __future__ import annotations

from collections.abc import Callable

import torch

Way = Callable[[int], torch.Tensor]
# Splits that its Triton kernel is given at most.
_SPLITS = (8, 64)
# FlashMLA takes no other; contexts are whole pages.
_PAGE = 64


def ways(q: torch.Tensor, copies: list[torch.Tensor], latent_dim: int, scale: float) -> dict[str, Way]:
    """Return what is installed, by name; nothing without a GPU.

    Args:
        q: absorbed queries, [batch, heads, latent_dim + rope_dim].
        copies: rows of all requests, [batch, tokens, latent_dim + rope_dim] each; tokens are a multiple of 64.
        latent_dim: channels of a row that are values, too.
        scale: of the logits.
    """
    if not q.is_cuda:
        return {}
    found: dict[str, Way] = {}
    for make in (_triton, _flash_mla, _flash_attention3):
        try:
            found |= make(q, copies, latent_dim, scale)
        except ImportError as error:
            print(f"  {make.__name__.strip('_')} is not installed: {error}")
    return found


def _triton(q: torch.Tensor, copies: list[torch.Tensor], latent_dim: int, scale: float) -> dict[str, Way]:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    (batch, heads, _), length = q.shape, copies[0].shape[1]
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    slots = torch.arange(batch * length, device=q.device)
    out = q.new_empty(batch, heads, latent_dim)

    def way(most: int) -> Way:
        partial = torch.empty(batch, heads, most, latent_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, most, dtype=torch.float32, device=q.device)
        splits = torch.full((batch,), most, dtype=torch.int32, device=q.device)

        def attend(copy: int) -> torch.Tensor:
            rows = copies[copy].flatten(0, 1)[:, None]
            decode_attention_fwd(
                *(q, rows, rows[..., :latent_dim], out, indptr, slots, partial, lse, splits, most, scale, 1.0, 1.0)
            )
            return out

        return attend

    return {f"sglang-triton-splits{most}": way(most) for most in _SPLITS}


def _flash_mla(q: torch.Tensor, copies: list[torch.Tensor], latent_dim: int, scale: float) -> dict[str, Way]:
    from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

    lengths, table = _paged(copies[0])
    plan, splits = get_mla_metadata(lengths, q.shape[1], 1)

    def attend(copy: int) -> torch.Tensor:
        pages = copies[copy].reshape(-1, _PAGE, 1, q.shape[-1])
        out, _ = flash_mla_with_kvcache(
            q[:, None], pages, table, lengths, latent_dim, plan, splits, softmax_scale=scale, causal=True
        )
        return out[:, 0]

    return {"flash-mla": attend}


def _flash_attention3(q: torch.Tensor, copies: list[torch.Tensor], latent_dim: int, scale: float) -> dict[str, Way]:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    lengths, table = _paged(copies[0])
    latents, rope = q[:, None, :, :latent_dim].contiguous(), q[:, None, :, latent_dim:].contiguous()

    def attend(copy: int) -> torch.Tensor:
        pages = copies[copy].reshape(-1, _PAGE, 1, q.shape[-1])
        out: torch.Tensor = flash_attn_with_kvcache(
            rope, pages[..., latent_dim:], pages[..., :latent_dim], qv=latents, cache_seqlens=lengths,
            page_table=table, softmax_scale=scale, causal=True,
        )  # fmt: skip
        return out[:, 0]

    return {"fa3": attend}


def _paged(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lengths and page table of requests whose rows lie one after another."""
    batch, length = rows.shape[:2]
    pages = torch.arange(batch * length // _PAGE, dtype=torch.int32, device=rows.device)
    return torch.full((batch,), length, dtype=torch.int32, device=rows.device), pages.view(batch, -1)
