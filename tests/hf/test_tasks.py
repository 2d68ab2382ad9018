"""Tasks: judges that tell right from wrong, programs that can't cheat or run away, and runs that are paired."""

import json

import pytest

transformers = pytest.importorskip("transformers")

from test_tile_cache import make_model, prompt  # noqa: E402 (after the check)

from benchmarks.quality import __main__ as command  # noqa: E402
from benchmarks.quality.generate import Asked, by_engine  # noqa: E402
from benchmarks.quality.sandbox import all_pass, passes  # noqa: E402
from benchmarks.quality.tasks import JudgeFailed, Task, check_judge, humaneval, last_number, needles  # noqa: E402
from kvarn.evaluation.generate import cut, greedy  # noqa: E402
from kvarn.evaluation.paired import mcnemar_p, pair  # noqa: E402

PROBLEM = {
    "task_id": "HumanEval/0", "entry_point": "double", "canonical_solution": "    return 2 * x\n",
    "prompt": "from math import floor\n\n\ndef double(x):\n    \"\"\"Twice x.\"\"\"\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}  # fmt: skip


class Words:
    """A tokenizer of letters without a template."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))

    def batch_decode(self, answers, skip_special_tokens):
        return [self.decode(answer) for answer in answers]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<{messages[0]['content']}>"


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The interpreter is too slow for a model."""
    monkeypatch.delenv("KVARN_FORCE_TRITON", raising=False)


def test_only_programs_that_come_to_their_end_pass():
    programs = [
        "x = 1",
        "assert False",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "x = bytearray(3 << 30)",
        "open('large', 'wb').write(bytes(2 << 20))",
        "print('x' * 1000)",
    ]
    assert all_pass(programs) == [True, False, False, False, False, False, True]


def test_a_program_that_never_ends_is_stopped_with_what_it_started():
    assert not passes("import subprocess; subprocess.run(['sleep', '60'])", seconds=0.5)


def test_humaneval_runs_the_function_of_an_answer(monkeypatch):
    monkeypatch.setattr("benchmarks.quality.tasks.texts.humaneval_problems", lambda: [PROBLEM] * 4)
    task = humaneval()
    answers = [
        "def double(x):\n    return floor(2 * x)\n```\nThis doubles x.",
        "def double(x):\n    return 2 * x",
        "def double(x):\n    return x\n```\n",
        "I can't.",
    ]
    assert task.judge(answers) == [True, True, False, False]
    assert len(humaneval(limit=1).items) == 1
    assert "def double" in Words().decode(task.prompts(Words())[0])
    monkeypatch.setitem(PROBLEM, "canonical_solution", "    return 0\n")
    with pytest.raises(JudgeFailed, match="humaneval"):
        humaneval()


def test_a_judge_that_is_wrong_either_way_is_refused():
    check_judge("fair", lambda answers: [answer == "a" for answer in answers], ["a"], ["b"])
    for unfair in (True, False):
        with pytest.raises(JudgeFailed):
            check_judge("unfair", lambda answers, unfair=unfair: [unfair] * len(answers), ["a"], ["b"])


def test_the_last_number_counts():
    assert last_number("4 and 5, so\n#### 1,234.50") == 1234.5
    assert last_number("minus -3.") == -3
    assert last_number("none") is None


def test_needles_stand_where_they_should():
    text = "A sentence of hay. " * 100
    task = needles(text, 1160, Words())
    assert len(task.items) == len(task.questions) == 40
    assert task.judge(["no"] * 40) == [False] * 40
    for item, question in zip(task.items, task.questions, strict=True):
        colour, _, depth = item.partition(" at ")
        assert question.count(f"{colour} door is") == 1
        assert question.index(f"{colour} door is") / 1000 == pytest.approx(float(depth), abs=0.08)
    with pytest.raises(ValueError, match="longer text"):
        needles("short", 1160, Words())


def test_mcnemar_is_the_binomial_test_of_discordant_items():
    assert mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1.0
    assert mcnemar_p(0, 6) == mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(1, 9) == pytest.approx(2 * 11 / 1024)
    assert pair(["a", "b"], ["b", "c", "d"]).lost == ("c", "d")
    assert pair(["a", "b"], ["b", "c", "d"]).won == ("a",)


def test_answers_are_what_the_model_goes_on_with_one_by_one():
    model, longer = make_model(), prompt()[0].tolist()
    prompts = [longer, longer[:150], longer[5:], longer[:150]]
    for dtype in ("auto", "kvarn_k4v2_g128"):
        together = greedy(model, dtype, prompts, 6)
        assert together == [greedy(model, dtype, [one], 6)[0] for one in prompts]
        assert together[1] == together[3] != together[0]
        stop = together[0][2]
        assert greedy(model, dtype, prompts[:1], 6, [stop])[0] == cut(together[0], [stop])
    assert cut([5, 6, 7, 6], [6]) == [5, 6]


def test_an_engine_is_asked_all_tasks_at_once_and_its_answers_end_where_they_should(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 7]}))
    jobs = []

    def run_job(engine, job, work, name):
        jobs.append(job)
        return {"answers": [[[1, 8, 2]], [[3, 7, 9], [4, 5, 6]]]}

    monkeypatch.setattr("benchmarks.quality.generate.run_job", run_job)
    generate = by_engine("vllm", str(tmp_path), "float16", 4, {"seed": 1}, {"enforce_eager": True})
    asked = [Asked([[1]], 3), Asked([[2], [3]], 3)]
    assert generate("kvarn_k4v2_g128", asked) == [[[1, 8]], [[3, 7], [4, 5, 6]]]
    generate("auto", asked)
    assert [job["engine"]["kv_cache_dtype"] for job in jobs] == ["kvarn_k4v2_g128", "auto"]
    assert ["enforce_eager" in job["engine"] for job in jobs] == [False, True]
    assert all(job["engine"]["seed"] == 1 for job in jobs)
    assert jobs[0]["answers"][1] == {"prompts": [[2], [3]], "new_tokens": 3}


def test_rows_are_paired_with_the_models_own_dtype_and_not_asked_again(tmp_path, monkeypatch, capsys):
    task = Task(
        "spell", tuple("abc"), tuple("ABC"), "", 1, lambda said: [x == y for x, y in zip(said, "abc", strict=True)]
    )
    monkeypatch.setattr(command, "_tasks", lambda *_: [task])
    monkeypatch.setattr(command.AutoTokenizer, "from_pretrained", lambda _: Words())
    said = {"auto": "abx", "kvarn_k4v2_g128": "axc", "kvarn_k4v4_g128": "abc"}
    asked = []

    def generate(dtype, tasks):
        asked.append(dtype)
        assert tasks[0].prompts[0] == [ord(letter) for letter in "<A>"]
        return [[[ord(letter)] for letter in said[dtype]]]

    monkeypatch.setattr(command, "_generate", lambda _: generate)
    out = tmp_path / "tasks.json"
    arguments = ["gsm8k", "--engine", "transformers", "--model", "folder/m", "--out", str(out), "--dtypes"]
    command.main([*arguments, "kvarn_k4v2_g128"])
    command.main([*arguments, "kvarn_k4v2_g128", "kvarn_k4v4_g128"])
    assert asked == list(said)
    rows = {row["dtype"]: row for row in json.loads(out.read_text())["rows"]}
    assert [rows[dtype]["right"] for dtype in said] == [2, 2, 3]
    assert (rows["kvarn_k4v2_g128"]["lost"], rows["kvarn_k4v2_g128"]["won"]) == (["b"], ["c"])
    assert (rows["kvarn_k4v4_g128"]["lost"], rows["kvarn_k4v4_g128"]["won"]) == ([], ["c"])
    assert rows["kvarn_k4v4_g128"]["p_mcnemar"] == 1.0
