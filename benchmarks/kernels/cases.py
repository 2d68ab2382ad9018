"""Cases: the shapes of decode attention that are measured, in the order in which they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvarn.presets import get_preset

_K = 1024
_BATCHES = (1, 16, 64)
_CONTEXTS = (1 * _K, 4 * _K, 8 * _K, 16 * _K, 32 * _K)
_LONG_CONTEXTS = (64 * _K, 128 * _K)
_GROUPS = (4, 8)
MAIN_PRESET = "kvarn_k4v2_g128"
_OTHER_PRESETS = tuple(f"kvarn_{name}" for name in (
    "k4v4_g128", "k8v4_g128", "k2v2_g128", "k4v2_g64", "k4v4_g64", "k4v3_g128", "k3v3_g128",
))  # fmt: skip
_OTHER_HEAD_DIMS = (64, 96, 192, 256)
# Where bytes outweigh launches, so that a share of the bandwidth says something about the kernel.
_LARGE = (16 * _K,) * 64
_MEDIUM = (16 * _K,) * 16
_VERIFY_ROWS = 4
_VERIFIED = (_MEDIUM, (64 * _K,))
# Groups of query heads and rows of more columns than a program has.
_VERIFIED_WIDE = ((8, 8), (16, 4))
_LOGIT_CAP = 30.0
# What tensor parallelism leaves of a model on a GPU, or a small model has.
_FEW_HEADS = (1, 2)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of decode attention.

    Args:
        contexts: nominal tokens of each request; `seq_lens` are the exact ones.
        preset: cache dtype.
        group: query heads of one kv head.
        kv_heads: kv heads.
        head_dim: channels of one head.
        q_len: query rows a request; above 1 as a speculative verify has them.
        dtype: model dtype, a name in torch.
        logit_cap: soft cap of the logits, 0 for none.
        sealing: every request fills a tile in this step. Otherwise none does, as in the median step.
    """

    contexts: tuple[int, ...]
    preset: str = MAIN_PRESET
    group: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    dtype: str = "float16"
    logit_cap: float = 0.0
    sealing: bool = False

    @property
    def batch(self) -> int:
        """Requests."""
        return len(self.contexts)

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def uniform(self) -> bool:
        """Whether all requests have one length."""
        return len(set(self.contexts)) == 1

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Tokens of each request after the step.

        Half a tile below the nominal length, so that tails have the size that they have on average: raw rows number
        tail + tile / 2. A step that seals ends on the nominal length.
        """
        short = 0 if self.sealing else get_preset(self.preset).tile_tokens // 2
        return tuple(context - short for context in self.contexts)

    @property
    def shape(self) -> str:
        """Requests and nominal lengths, e.g. ``16x16k`` or ``1x64k+31x4k``."""
        lengths = dict.fromkeys(self.contexts)
        return "+".join(f"{self.contexts.count(length)}x{_short(length)}" for length in lengths)

    @property
    def name(self) -> str:
        """Unique name: preset, shape, group, then whatever differs from the main table."""
        parts = [self.preset.removeprefix("kvarn_"), self.shape, f"gqa{self.group}"]
        parts += [f"kv{self.kv_heads}"] * (self.kv_heads != 8)
        parts += [f"d{self.head_dim}"] * (self.head_dim != 128)
        parts += [f"q{self.q_len}"] * (self.q_len > 1)
        parts += [self.dtype] * (self.dtype != "float16")
        parts += [f"cap{self.logit_cap:g}"] * (self.logit_cap > 0)
        parts += ["seal"] * self.sealing
        return "/".join(parts)


def registry() -> list[Case]:
    """Return every case. Verify rows come last: should they take the GPU down, all else has been measured."""
    cases = [Case((context,) * batch, group=group) for batch in _BATCHES for context in _CONTEXTS for group in _GROUPS]
    cases += [Case((context,), group=group) for context in _LONG_CONTEXTS for group in _GROUPS]
    cases += [Case((64 * _K,) + (4 * _K,) * 31), Case((128,) * 32 + (4 * _K,) * 32)]
    cases += [Case(_MEDIUM, group=1), Case(_MEDIUM, group=16), Case(_LARGE, group=16)]
    cases += [Case(_LARGE, preset=preset) for preset in _OTHER_PRESETS]
    cases += [Case(_LARGE, head_dim=head_dim) for head_dim in _OTHER_HEAD_DIMS]
    cases += [Case(_MEDIUM, dtype="bfloat16"), Case(_MEDIUM, logit_cap=_LOGIT_CAP)]
    cases += [Case((4 * _K,) * batch, sealing=True) for batch in _BATCHES]
    alone = [(32 * _K,), (128 * _K,)]
    cases += [Case(contexts, kv_heads=heads) for heads in _FEW_HEADS for contexts in (*alone, _MEDIUM)]
    cases += [Case(contexts, group=group, q_len=_VERIFY_ROWS) for contexts in _VERIFIED for group in _GROUPS]
    cases += [Case(contexts, group=group, q_len=rows) for contexts in _VERIFIED for group, rows in _VERIFIED_WIDE]
    cases += [Case(alone[0], kv_heads=heads, q_len=_VERIFY_ROWS) for heads in _FEW_HEADS]
    return cases


def select(cases: Iterable[Case], only: str | None = None, quick: bool = False) -> list[Case]:
    """Return the cases whose names match, with those that they are compared with.

    Args:
        cases: the registry.
        only: regular expression, searched in names.
        quick: one case of each kind instead of all.
    """
    cases = list(cases)
    chosen = [case for case in cases if (not quick or _is_quick(case)) and re.search(only or "", case.name)]
    chosen += [single_row(case) for case in chosen]
    return [case for case in cases if case in chosen]


def single_row(case: Case) -> Case:
    """Return the case with one query row a request, which verify rows are compared with."""
    return replace(case, q_len=1)


def _is_quick(case: Case) -> bool:
    return case.group == 8 and case.shape in ("1x1k", "1x32k", "16x16k", "64x16k", "1x64k+31x4k")


def _short(length: int) -> str:
    return f"{length // _K}k" if length % _K == 0 else str(length)
