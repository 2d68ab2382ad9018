"""What must hold before a figure is reported: answers repeat themselves, and clients got all that they asked for."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from kvarn.bench.engines import ClientReport, Counters
from kvarn.bench.server import call
from kvarn.bench.workloads import Run
from kvarn.errors import KVarNError

# Long enough that most of it is read from records when the answer is written.
PASSAGE = Path(__file__).with_name("passage.txt")
QUESTION = "What is the name of the lighthouse keeper?"
_ANSWER_TOKENS = 24
# Prefix hits come in whole tiles or blocks, of 128 tokens at most by default.
_SURELY_FOUND_TOKENS = 1024


class InsaneResult(KVarNError):
    """A server or client did something that makes its figures worthless."""


def check_answer(url: str, model: str) -> str:
    """Ask a server a fixed question greedily until its prompt is in the cache, then twice; return the answer.

    Args:
        url: address of the server.
        model: under which name it serves the model.

    Raises:
        InsaneResult: the two answers differ, or are empty.
        ServerError: it gave no answer.
    """
    # The first may differ: its prompt is computed whole, and those of the others are found in the cache.
    _, first, second = (_answer(url, model) for _ in range(3))
    if first != second:
        raise InsaneResult(
            f"The same question got two greedy answers, {first!r} and {second!r}: no figure is reported."
        )
    if not first.strip():
        raise InsaneResult("The answer to a fixed question is empty: no figure is reported; see the server's log.")
    return first.strip()


def check_report(report: ClientReport, run: Run) -> None:
    """Check that a client was answered whole.

    Raises:
        InsaneResult: requests or tokens are missing, or a figure is none.
    """
    asked = run.requests * run.output_tokens
    wrong = []
    if report.completed != run.requests:
        wrong.append(f"{report.completed} of {run.requests} requests were completed")
    if report.output_tokens != asked:
        wrong.append(f"{report.output_tokens} output tokens came of {asked}")
    figures = asdict(report)
    wrong += [f"{name} is {value}" for name, value in figures.items() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise InsaneResult(f"{'; '.join(wrong)}: no figure is reported. The logs of server and client have the cause.")


def check_cached(counted: Counters, run: Run) -> None:
    """Check that prompts which were to be in the cache were found there.

    Args:
        counted: by the server, during the run.
        run: the run; one whose prompts are shorter than a few tiles or blocks is not judged.

    Raises:
        InsaneResult: fewer than half of the prompt tokens were found.
    """
    if not run.cached or run.input_tokens < _SURELY_FOUND_TOKENS:
        return
    if counted.hit_tokens < counted.prompt_tokens / 2 or not counted.prompt_tokens:
        raise InsaneResult(
            f"{counted.hit_tokens:g} of {counted.prompt_tokens:g} prompt tokens were found in the cache that a run "
            "before had filled, so that latencies would be those of prompts: no figure is reported. Let the server "
            "keep its prefix cache, and count what it finds."
        )


def _answer(url: str, model: str) -> str:
    prompt = f"{PASSAGE.read_text()}\nQuestion: {QUESTION}\nAnswer:"
    request = {"model": model, "prompt": prompt, "max_tokens": _ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    text: str = call(f"{url}/v1/completions", request)["choices"][0]["text"]
    return text
