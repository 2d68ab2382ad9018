"""One model and one prompt in both engines, each in its own environment: the same records and the same answers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ask_engine import LAYERS, NEW_TOKENS, PROMPT_TOKENS
from engine_process import Models, environment
from tiny_models import LLAMA_GROUP_3, QWEN3_GROUP_2, TinyModel

_ROOT = Path(__file__).resolve().parents[2]
_ASK = Path(__file__).with_name("ask_engine.py")
_VLLM_PYTHON = Path(os.environ.get("KVARN_VLLM_PYTHON", _ROOT / ".venv-vllm" / "bin" / "python"))
_TIMEOUT_S = 200
_TILE = 128
# The engines round differently, in the last bits of float32.
EXACT_DIFFERENCE = 1e-4
# So a code on the edge between two values may fall to either side, which tiny random models answer with more than real
# ones: the largest single difference of SmolLM2 is below the mean allowed here.
MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 1e-3, 1e-2

Record = Callable[[str, object], None]
pytestmark = pytest.mark.skipif(not _VLLM_PYTHON.exists(), reason="no environment with vLLM (make env-vllm)")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a rank's cache held in the end, by layer, and the tiles that each step sealed."""

    records: dict[int, torch.Tensor]
    sealed: list[list[int]]


OneRank = Callable[[str], tuple[list[Kept], Path]]


def ask(engine: str, model: Path, folder: Path, ranks: int = 1, **variables: str) -> Path:
    """Ask an engine; returns the file with its answer."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / f"{engine}.json"
    if ranks > 1:
        # one core a rank: neither engine puts two on a socket by itself
        variables |= dict.fromkeys(("SGLANG_CPU_OMP_THREADS_BIND", "VLLM_CPU_OMP_THREADS_BIND"), "0|1")
    python = sys.executable if engine == "sglang" else str(_VLLM_PYTHON)
    known = environment() if engine == "sglang" else vllm_environment()
    command = [python, str(_ASK), engine, str(model), str(answer), str(ranks)]
    done = subprocess.run(
        command, env=known | variables, timeout=_TIMEOUT_S, capture_output=True, text=True, check=False
    )
    assert answer.exists(), (done.stdout + done.stderr)[-4000:]
    return answer


def ask_for_records(engine: str, model: Path, folder: Path, ranks: int = 1) -> tuple[list[Kept], Path]:
    """Ask an engine that caches rows of a table; returns what each rank kept, and the file with the answer."""
    path = folder / f"{engine}.pt"
    backend = f"kvarn.{engine}_backend.backend"
    answer = ask(engine, model, folder, ranks, CROSS_TEST_RECORDS=str(path), CROSS_TEST_BACKEND=backend)
    return [Kept(**torch.load(path.with_suffix(f".{rank}.pt"))) for rank in range(ranks)], answer


def vllm_environment() -> dict[str, str]:
    """Return this environment, without what belongs to the engine of the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVARN_", "PYTHONPATH"))}
    return kept | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def one_rank(models: Models, tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    """Ask each engine once for records, which follow from the table whatever the model."""
    path = models.path(QWEN3_GROUP_2)
    return functools.cache(lambda engine: ask_for_records(engine, path, tmp_path_factory.mktemp(engine)))


def test_the_same_rows_give_the_same_records(one_rank: OneRank) -> None:
    (ours,), (theirs,) = (one_rank(engine)[0] for engine in ("sglang", "vllm"))
    assert sorted(ours.records) == sorted(theirs.records) == list(range(LAYERS))
    for layer in range(LAYERS):
        assert ours.records[layer].shape[0] == (PROMPT_TOKENS + NEW_TOKENS - 1) // _TILE
        assert ours.records[layer].any()
        assert torch.equal(ours.records[layer], theirs.records[layer])


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_two_ranks_keep_and_answer_what_one_does(engine: str, models: Models, one_rank: OneRank) -> None:
    (one,), alone = one_rank(engine)
    two, together = ask_for_records(engine, models.path(QWEN3_GROUP_2), models.scratch(f"two-ranks-{engine}"), ranks=2)
    assert any(tile >= 0 for step in one.sealed for tile in step)
    assert [rank.sealed for rank in two] == [one.sealed, one.sealed]
    for layer, records in one.records.items():
        # a rank has half of the kv heads
        assert torch.equal(records, torch.cat([rank.records[layer] for rank in two], dim=1))
    first, second = (json.loads(file.read_text()) for file in (alone, together))
    assert first["tokens"] == second["tokens"]
    apart = [abs(a - b) for a, b in zip(first["logprobs"], second["logprobs"], strict=True)]
    assert max(apart) < EXACT_DIFFERENCE


def differences(models: Models, model: TinyModel, **variables: str) -> list[float]:
    """Return how far the log probabilities of the engines' answers are apart; the tokens must be the same."""
    folder = models.scratch(f"cross-{model.name}-{len(variables)}")
    ours, theirs = (
        json.loads(ask(engine, models.path(model), folder, **variables).read_text()) for engine in ("sglang", "vllm")
    )
    assert len(ours["tokens"]) == NEW_TOKENS
    assert ours["tokens"] == theirs["tokens"]
    return [abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)]


def test_the_same_model_gives_the_same_answers_from_exact_rows(models: Models, record_property: Record) -> None:
    found = differences(models, QWEN3_GROUP_2, KVARN_TAIL_TOKENS="1024")
    record_property("engines, log probabilities from exact rows, largest difference", max(found))
    assert max(found) < EXACT_DIFFERENCE


@pytest.mark.parametrize("model", [LLAMA_GROUP_3, QWEN3_GROUP_2], ids=lambda model: model.name)
def test_the_same_model_gives_the_same_answers(model: TinyModel, models: Models, record_property: Record) -> None:
    found = differences(models, model)
    mean = sum(found) / len(found)
    record_property(f"engines, log probabilities of {model.name}, mean and largest difference", (mean, max(found)))
    assert mean < MEAN_DIFFERENCE
    assert max(found) < LARGEST_DIFFERENCE
