"""Tasks: what a model is asked, and whether its answers are right."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.quality.sandbox import all_pass
from kvarn.evaluation import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FENCE = "```"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NEEDLES_PER_DEPTH = 8
_COLOURS = ("amber", "azure", "crimson", "emerald", "ivory", "scarlet", "turquoise", "violet")
# What a question, a needle and a chat template take of a prompt, at most.
_AROUND_TOKENS = 160


class JudgeFailed(Exception):
    """The judge of a task is wrong about answers that are known."""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions that are asked each on its own.

    Args:
        name: what results call it.
        items: names of the questions.
        questions: what the user says.
        opening: how the answer begins, already written.
        new_tokens: most tokens of an answer.
        judge: tells of the answers, all of them in order and without the opening, which are right.
    """

    name: str
    items: tuple[str, ...]
    questions: tuple[str, ...]
    opening: str
    new_tokens: int
    judge: Callable[[Sequence[str]], list[bool]]

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the questions as token ids, up to where the model goes on."""
        asked = []
        for question in self.questions:
            said = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            asked.append(tokenizer(text + self.opening, add_special_tokens=False)["input_ids"])
        return asked


def humaneval(limit: int | None = None) -> Task:
    """Return HumanEval: complete 164 functions, or the first of them, whose tests are run.

    Raises:
        KVarNError: the problems aren't installed.
        JudgeFailed: a known solution fails its tests, or no solution passes them.
    """
    problems = texts.humaneval_problems()[:limit]

    def judge(answers: Sequence[str]) -> list[bool]:
        return all_pass([_program(p, a) for p, a in zip(problems, answers, strict=True)])

    known = [_fenced(problem["prompt"] + problem["canonical_solution"]) for problem in problems]
    check_judge("humaneval", judge, known, [_FENCE] * len(problems))
    return Task(
        "humaneval",
        tuple(problem["task_id"] for problem in problems),
        tuple(
            "Complete the following Python function. Answer with the whole function, and what it needs, in one block "
            f"of code.\n\n```python\n{problem['prompt']}```"
            for problem in problems
        ),
        "```python\n",
        640,
        judge,
    )


def gsm8k(limit: int | None = None) -> Task:
    """Return 100 word problems of GSM8K, or the first of them, of which the last number of the answer counts.

    Raises:
        KVarNError: the problems aren't installed.
    """
    problems = texts.gsm8k_problems()[:limit]
    expected = [problem["expected"] for problem in problems]

    def judge(answers: Sequence[str]) -> list[bool]:
        return [last_number(answer) == float(wanted) for answer, wanted in zip(answers, expected, strict=True)]

    check_judge("gsm8k", judge, [f"6 times 7, so the answer is {wanted}." for wanted in expected], [""] * len(problems))
    ask = "Think step by step, and write the answer, a number, at the end after ####.\n\n"
    questions = tuple(ask + problem["prompt"] for problem in problems)
    return Task("gsm8k", tuple(problem["id"] for problem in problems), questions, "", 400, judge)


def needles(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return questions for numbers that stand in a long text, at every depth.

    Args:
        text: the haystack, at least as long.
        tokens: of a prompt, about.
        tokenizer: of the model.

    Raises:
        ValueError: the text is too short.
    """
    ids = tokenizer(text)["input_ids"]
    if len(ids) < tokens - _AROUND_TOKENS:
        raise ValueError(f"The haystack has {len(ids)} tokens, not {tokens - _AROUND_TOKENS}; take a longer text.")
    hay = tokenizer.decode(ids[: tokens - _AROUND_TOKENS])
    draw = random.Random(tokens)
    items, questions, numbers = [], [], []
    for depth in _DEPTHS:
        for colour in _COLOURS[:_NEEDLES_PER_DEPTH]:
            number = str(draw.randrange(1_000_000, 10_000_000))
            needle = f" The number of the {colour} door is {number}. "
            at = hay.rfind(". ", 0, max(2, int(len(hay) * depth))) + 1
            items.append(f"{colour} at {depth:g}")
            numbers.append(number)
            questions.append(
                f"Read this text.\n\n{hay[:at]}{needle}{hay[at:]}\n\nWhat is the number of the {colour} door?"
            )

    def judge(answers: Sequence[str]) -> list[bool]:
        return [number in answer for number, answer in zip(numbers, answers, strict=True)]

    opening = "The number is "
    check_judge("needles", judge, numbers, [""] * len(numbers))
    return Task(f"needles-{tokens}", tuple(items), tuple(questions), opening, 12, judge)


def check_judge(
    name: str, judge: Callable[[Sequence[str]], list[bool]], right: Sequence[str], wrong: Sequence[str]
) -> None:
    """Raise JudgeFailed unless a judge says yes to all right answers and no to all wrong ones."""
    mistaken = [i for i, yes in enumerate(judge(right)) if not yes], [i for i, yes in enumerate(judge(wrong)) if yes]
    if any(mistaken):
        raise JudgeFailed(f"{name}: right answers {mistaken[0]} are judged wrong, wrong ones {mistaken[1]} right.")


def last_number(answer: str) -> float | None:
    """Return the last number in a text, or None."""
    found = _NUMBER.findall(answer)
    return float(found[-1].replace(",", "")) if found else None


def _fenced(code: str) -> str:
    return f"{code}\n{_FENCE}\n"


def _program(problem: dict[str, str], answer: str) -> str:
    """Return a problem's prompt, the function that an answer gives before its block of code ends, and the tests."""
    code = answer.partition(_FENCE)[0]
    return f"{problem['prompt']}\n    pass\n\n{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"
