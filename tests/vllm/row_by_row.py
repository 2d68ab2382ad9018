"""Every row computed by itself, so that answers that read the same values are equal bit for bit.

A CPU's matrix kernels round differently for different numbers of rows: a token that was decoded and the same token
prefilled differ in the last bit, and a K row that does may move a code by one. With this, what is left to differ is
what KVarN answers for: which rows a query reads, whether from a record or raw, and what the records hold.
"""

from __future__ import annotations

from typing import Any

import instruments
import pytest
import torch


def compute_row_by_row(patch: pytest.MonkeyPatch) -> None:
    """Split torch's and vLLM's matrix products and the core's attention into rows, until `patch` is undone."""
    import vllm._custom_ops as ops

    from kvarn.core import attend
    from kvarn.core.latent import attend as latent_attend

    # The instruments of the SGLang tests replace these for the life of a process; set to themselves, `patch` undoes it.
    owners: list[tuple[Any, str]] = [(torch, name) for name in ("matmul", "bmm", "einsum")]
    owners.append((torch.nn.functional, "linear"))
    owners += [(module, "softmax_attention") for module in (attend, latent_attend)]
    for owner, name in owners:
        patch.setattr(owner, name, getattr(owner, name))
    patch.setenv(instruments.ROWWISE, "1")
    instruments.install()
    onednn_mm = ops.onednn_mm

    def onednn_mm_by_row(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([onednn_mm(handler, row, bias) for row in x.reshape(-1, x.shape[-1]).split(1)])

    patch.setattr(ops, "onednn_mm", onednn_mm_by_row)
