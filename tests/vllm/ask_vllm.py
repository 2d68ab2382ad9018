"""Ask one vLLM engine in a process of its own, and write the answers: ``python ask_vllm.py MODEL RESULTS [OPTIONS]``.

OPTIONS are arguments of ``vllm.LLM``, as JSON. The rest the environment says: which plugins are loaded, which model
runner runs, and by PYTHONPATH which vLLM it is and where the helpers of the SGLang tests are. Whoever imports this can
ask the same elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from plan import Answer, Request
from tiny_models import prompt

from kvarn.core.tail import TailState

CHUNK = 128
NEW_TOKENS = 8
LENGTHS = (1, 129, 300)
# In one step with each other: the second is a hit on the first. Both decode over a tile's end, for which there is no
# block left.
TOGETHER = (250, 251, 252)
BLOCKS = 12


@dataclass(frozen=True, slots=True)
class Found:
    """What one engine did.

    Args:
        version: version of vLLM.
        runner: module of the model runner.
        answers: by request name.
        admitted: of each step in which requests started or resumed, their first tail blocks.
        forgotten: the rings of every call of `TailState.forget`.
    """

    version: str
    runner: str
    answers: dict[str, Answer]
    admitted: list[list[int]]
    forgotten: list[list[int]]


def ask_everything(model: Path, **options: Any) -> Found:
    """Ask cold runs and hits, and requests that run together in a pool that is too small for them."""
    from serving import serving
    from vllm.version import __version__

    forgotten: list[list[int]] = []
    forget = TailState.forget

    def watched_forget(state: TailState, rows: torch.Tensor) -> None:
        forgotten.append(sorted(rows.tolist()))
        forget(state, rows)

    watched = mock.patch.object(TailState, "forget", watched_forget)
    options = {"max_num_batched_tokens": CHUNK, "num_gpu_blocks_override": BLOCKS} | options
    with watched, serving(model, **options) as engine:
        answers: dict[str, Answer] = {}
        for n in LENGTHS:
            assert engine.flush()
            for kind in ("cold", "hit"):
                answers |= engine.ask(Request(f"{n}/{kind}", prompt(n, seed=n), NEW_TOKENS))
        assert engine.flush()
        answers |= engine.ask(*(Request(f"together/{n}", prompt(n), NEW_TOKENS) for n in TOGETHER))
        admitted = [sorted(step.admitted.values()) for step in engine.steps if step.admitted]
        return Found(__version__, engine.runner, answers, admitted, forgotten)


def read_found(path: Path) -> Found:
    """Read what `main` wrote."""
    found = json.loads(path.read_text())
    return Found(**found | {"answers": {name: Answer(**answer) for name, answer in found["answers"].items()}})


def main(model: Path, results: Path, options: str = "{}") -> None:
    """Ask, and write what was found."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        import triton_stand_in

        triton_stand_in.install()
    results.write_text(json.dumps(asdict(ask_everything(model, **json.loads(options)))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
