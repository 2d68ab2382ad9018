"""What tests change inside SGLang's scheduler, a copy of the driver's process, which installs these.

Four switches, set in the environment of the driver:

* ``ENGINE_TEST_TRACE=FILE`` writes one JSON line for each forward pass over chunks or drafts and checks KVarN's own
  state in every pass: no sink slot leaked or shared, no chunk that lost its open tile. Before drafts are verified,
  everything past a request's accepted tokens, in its ring and in records, is overwritten with NaN.
* ``ENGINE_TEST_ANSWERS=JSON`` gives SGLang a corpus of n-grams that knows how those sequences of tokens go on, and lets
  some drafts of models be right.
* ``ENGINE_TEST_ROWWISE=1`` computes every matrix product and every query row by itself. A CPU's matrix kernels round
  differently for different numbers of rows, so that without this a token that was decoded and the same token
  prefilled differ in the last bit. With it a difference can only come from which rows were read, and from where.
* ``ENGINE_TEST_STATES=1`` brings operations of recurrent layers, which SGLang has for other CPUs only.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recurrent_ops
import torch
from knowing_corpus import KnowingCorpus, correct_drafts

if TYPE_CHECKING:
    from kvarn.core.step import Step
    from kvarn.sglang_backend.metadata import StepBuilder

TRACE = "ENGINE_TEST_TRACE"
ROWWISE = "ENGINE_TEST_ROWWISE"
ANSWERS = "ENGINE_TEST_ANSWERS"
STATES = "ENGINE_TEST_STATES"


def install() -> None:
    """Install what the environment asks for."""
    if os.environ.get(ROWWISE) == "1":
        _compute_row_by_row()
    if os.environ.get(STATES) == "1":
        recurrent_ops.install()
    trace = os.environ.get(TRACE)
    if trace:
        _trace_steps(Path(trace))
    answers = os.environ.get(ANSWERS)
    if answers:
        from sglang.srt.speculative.cpp_ngram import ngram_corpus

        known = json.loads(answers)
        ngram_corpus.get_ngram_corpus_cls = lambda: partial(KnowingCorpus, known)
        correct_drafts(known)


def _compute_row_by_row() -> None:
    from kvarn.core import attend
    from kvarn.core.latent import attend as latent_attend

    linear, matmul, bmm, einsum = torch.nn.functional.linear, torch.matmul, torch.bmm, torch.einsum
    attention = attend.softmax_attention

    def linear_by_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([linear(row, weight, bias) for row in rows.split(1)])
        return out.reshape(*x.shape[:-1], -1)

    def matmul_by_row(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        if a.dim() == 2 and b.dim() == 2 and a.shape[0] > 1 and not options:
            return torch.cat([matmul(row, b) for row in a.split(1)])
        return matmul(a, b, **options)

    def bmm_by_row(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        found = torch.cat([bmm(row, b) for row in a.split(1, dim=1)], dim=1)
        return found if out is None else out.copy_(found)

    def einsum_by_token(equation: str, *operands: torch.Tensor) -> torch.Tensor:
        terms = equation.replace(" ", "").replace("->", ",").split(",")
        if all(term.startswith("t") for term in terms):
            return torch.cat([einsum(equation, *rows) for rows in zip(*(x.split(1) for x in operands), strict=True)])
        return einsum(equation, *operands)

    def attention_by_row(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
        logit_cap: float = 0.0,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for row, seen in zip(q.split(1), visible, strict=True):
            parts.append(attention(row, k[seen], v[seen], seen[seen][None], scale, logit_cap, sink_logits))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    torch.nn.functional.linear = linear_by_row
    torch.matmul, torch.bmm, torch.einsum = matmul_by_row, bmm_by_row, einsum_by_token
    attend.softmax_attention = latent_attend.softmax_attention = attention_by_row


def _trace_steps(path: Path) -> None:
    from kvarn.sglang_backend import metadata

    chunk, decode, verify = (getattr(metadata.StepBuilder, name) for name in ("chunk", "decode", "verify"))

    def check(builder: StepBuilder) -> None:
        state = builder.state
        state.check_integrity()
        if int(state.faults):
            raise RuntimeError(f"{int(state.faults)} chunks lost their open tile")

    def note(step: Step, batch: Any, drafts: int) -> None:
        line = {
            "prefix_lens": step.prefix_lens.tolist(),
            "seq_lens": step.seq_lens.tolist(),
            "own_start": step.own_start.tolist(),
            "rows": step.rows.tolist(),
            "rids": list(batch.rids or ()),
            "drafts": drafts,
            "restored": None if step.plan is None else step.plan.most_restored,
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def traced_chunk(self: StepBuilder, batch: Any) -> Step:
        step = chunk(self, batch)
        check(self)
        note(step, batch, 0)
        return step

    def traced_decode(self: StepBuilder, batch: Any) -> Step:
        step = decode(self, batch)
        check(self)
        return step

    def traced_verify(self: StepBuilder, batch: Any) -> Step:
        _poison(self, batch)
        step = verify(self, batch)
        check(self)
        note(step, batch, batch.input_ids.shape[0] // batch.batch_size - 1)
        return step

    metadata.StepBuilder.chunk = traced_chunk
    metadata.StepBuilder.decode = traced_decode
    metadata.StepBuilder.verify = traced_verify


def _poison(builder: StepBuilder, batch: Any) -> None:
    """Overwrite what drafts may have left behind, which nobody may read."""
    config = builder.state.config
    table = builder.pages(batch.req_pool_indices)
    for row, pages, done in zip(batch.req_pool_indices, table, batch.seq_lens.tolist(), strict=True):
        provisional = pages[done // config.tile_tokens : -(-(done + config.draft_tokens + 1) // config.tile_tokens)]
        wrong = torch.arange(done, done + config.draft_tokens) % config.ring_tokens
        for layer in builder.layers:
            layer.records[provisional.long()] = 0xFF
            layer.tails[row, :, :, wrong] = torch.nan
