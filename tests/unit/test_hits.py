"""The benchmark of first tokens: what it asks, what it refuses to report, and what it reports."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.serving import hits, turns, worker

CASES = [(256, 8), (0, 4)]


class Engine:
    """Answers with the last token of a prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.cached_tokens = 0

    def flush(self) -> None:
        self.asked.clear()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        assert new_tokens == 1
        self.asked += prompts
        self.cached_tokens = len(self.asked[0]) // 128 * 128 if len(self.asked) > 1 else 0
        return [[prompt[-1]] for prompt in prompts]


def measured(shift: int = 0) -> list[dict]:
    asked = hits.cut(list(range(1000)), CASES, prompts=4)
    found = [worker.first_tokens(Engine(), **case) for case in asked]
    return [{**case, "tokens": [token + shift for token in case["tokens"]]} for case in found]


def test_endings_follow_the_beginning_and_each_other() -> None:
    asked = hits.cut(list(range(1000)), CASES, prompts=4)
    assert [len(case["prefix"]) for case in asked] == [256, 0]
    assert asked[0]["endings"][1] == list(range(264, 272))
    with pytest.raises(SystemExit, match="has 200 tokens; 288 are needed"):
        hits.cut(list(range(200)), CASES, prompts=4)


def test_prompts_are_asked_one_by_one_after_their_beginning() -> None:
    engine = Engine()
    found = worker.first_tokens(engine, [1, 2, 3], [[4], [5]])
    assert engine.asked == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]]
    assert found["tokens"] == [4, 5]


def test_nothing_is_reported_of_misses_and_of_other_answers() -> None:
    good = measured()
    assert hits.gate(CASES, good, good, 0.8) == []
    missed = [{**good[0], "cached": [0] * 4}, good[1]]
    assert hits.gate(CASES, good, missed, 0.8) == ["Of 256 cached tokens only 0 were found."]
    (fault,) = hits.gate(CASES, good, measured(shift=1), 0.8)
    assert fault == "0% of the first tokens are those of the model dtype, fewer than 80%."


def test_a_row_tells_the_median_after_warming_up_and_how_many_answers_are_equal() -> None:
    args = Namespace(engine="sglang", model="folder/model", model_dtype="float16")
    baseline = [{"ms": [9, 9, 2, 1, 4], "tokens": [1, 2, 3, 4, 5]}] * 2
    ours = [{"ms": [9, 9, 3, 1, 5], "tokens": [1, 2, 3, 4, 0]}] * 2
    first, *_, last = hits.rows_of(args, CASES, {"auto": baseline, "kvarn_k4v2_g128": ours})
    assert (first["dtype"], first["ttft_ms"], first["of_model_dtype"]) == ("float16", 2, 1.0)
    assert (last["dtype"], last["ttft_ms"], last["of_model_dtype"]) == ("kvarn_k4v2_g128", 3, 1.25)
    assert (last["ttft_ms_low"], last["ttft_ms_high"], last["first_tokens_equal"]) == (1, 5, 4)


def test_processes_take_turns(tmp_path) -> None:
    log: list[int] = []

    def take(which: int) -> None:
        mine = turns.Turns(str(tmp_path / "turn"), which, 3)
        for _ in range(4):
            with mine.mine():
                log.append(which)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(take, range(3)))
    assert log == [0, 1, 2] * 4


def test_nobody_waits_for_a_process_that_failed(tmp_path, monkeypatch) -> None:
    first, second = (turns.Turns(str(tmp_path / "turn"), which, 2) for which in range(2))
    with pytest.raises(KeyError), first.mine():
        raise KeyError
    with pytest.raises(RuntimeError, match="has failed"), second.mine():
        pass
    monkeypatch.setattr(turns, "_PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match="has failed"), turns.Turns(str(tmp_path / "other"), 1, 2).mine():
        pass
