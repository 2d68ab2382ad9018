"""Who answers: a serving engine in a process of its own, or transformers here. Both as a function of prompts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.engines import started_with
from benchmarks.serving.jobs import run_job
from kvarn.evaluation.generate import cut, greedy

TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts of one task, token ids, and the most tokens of an answer."""

    prompts: list[list[int]]
    new_tokens: int


# Takes a cache dtype and what is asked, and returns a greedy answer for every prompt, token ids.
Generate = Callable[[str, list[Asked]], list[list[list[int]]]]


def by_engine(
    engine: str,
    model: str,
    model_dtype: str,
    requests: int,
    arguments: dict[str, Any],
    baseline_arguments: dict[str, Any],
) -> Generate:
    """Return the function that starts a serving engine with a cache dtype, as stock as it comes, and asks it.

    Args:
        engine: one of `ENGINES`.
        model: checkpoint folder.
        model_dtype: of weights and of the baseline's cache.
        requests: running requests allowed.
        arguments: more of the engine's own; baseline_arguments: more for the model's own cache dtype.

    The function raises EngineFailed if the engine does not answer.
    """

    def generate(dtype: str, asked: list[Asked]) -> list[list[list[int]]]:
        started = started_with(engine, model, model_dtype, dtype, requests, arguments, baseline_arguments)
        job = {"engine": started, "answers": [asdict(task) for task in asked]}
        with tempfile.TemporaryDirectory() as folder:
            answers = run_job(engine, job, Path(folder), f"tasks-{dtype}")["answers"]
        ends = stop_tokens(model)
        return [[cut(answer, ends) for answer in task] for task in answers]

    return generate


def by_transformers(model: str, model_dtype: str, device: str) -> Generate:
    """Return the function that runs a model here, with a cache of kvarn.hf or the exact one.

    Args:
        model: checkpoint folder.
        model_dtype: of weights and of the baseline's cache.
        device: where to run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, model_dtype)).to(device).eval()
    ends = stop_tokens(model)

    def generate(dtype: str, asked: list[Asked]) -> list[list[list[int]]]:
        return [greedy(loaded, dtype, task.prompts, task.new_tokens, ends) for task in asked]

    return generate


def stop_tokens(model: str) -> Collection[int]:
    """Return the tokens that end an answer, by a checkpoint's own account."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(model) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ends |= set(found if isinstance(found, list) else [] if found is None else [found])
    return ends
