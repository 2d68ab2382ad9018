"""The benchmark of drafts: runs that share a folder share its engines, and keep what they found."""

import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.serving import speculate, worker
from benchmarks.serving.speculate import _Asked


@pytest.fixture
def args(tmp_path, monkeypatch) -> Namespace:
    monkeypatch.setattr(speculate, "_POLL_S", 0.01)
    return Namespace(engine="vllm", method="draft_model", drafts=3, work=tmp_path)


def test_two_runs_share_the_engines(args, monkeypatch) -> None:
    both_at_work = threading.Barrier(2, timeout=10)
    measured: list[str] = []

    def measure(_: Namespace, asked: _Asked) -> dict[str, str]:
        if asked.name in "ab":
            both_at_work.wait()
        measured.append(asked.name)
        return {"name": asked.name}

    monkeypatch.setattr(speculate, "_measured", measure)
    asked = [_Asked(name, "auto", False, {}) for name in "abcde"]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: speculate._results(args, asked), range(2))
    assert first == second == [{"name": name} for name in "abcde"]
    assert sorted(measured) == list("abcde")


def test_what_was_found_is_kept_and_what_failed_is_not(args, monkeypatch) -> None:
    asked = [_Asked("one", "auto", True, {})]

    def fail(_: Namespace, asked: _Asked) -> dict[str, str]:
        raise KeyError(asked.name)

    monkeypatch.setattr(speculate, "_measured", fail)
    with pytest.raises(KeyError):
        speculate._results(args, asked)
    monkeypatch.setattr(speculate, "_measured", lambda *_: {"found": 1})
    assert speculate._results(args, asked) == [{"found": 1}]
    monkeypatch.setattr(speculate, "_measured", fail)
    assert speculate._results(args, asked) == [{"found": 1}]


class Chains:
    """An engine whose steps give three tokens, and take a hundredth of a second each."""

    def __init__(self, monkeypatch) -> None:
        self.steps = self.now = 0
        monkeypatch.setattr(worker.time, "perf_counter", lambda: self.now / 100)

    def flush(self) -> None:
        """Empty no cache."""

    def verified(self) -> tuple[int, int]:
        return self.steps, 2 * self.steps

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        steps = (new_tokens + 2) // 3
        self.steps, self.now = self.steps + steps, self.now + steps
        return [[0] * new_tokens for _ in prompts]


@pytest.mark.parametrize("drafts", [True, False])
def test_speed_with_drafts_comes_with_what_a_step_gave_and_took(args, monkeypatch, drafts: bool) -> None:
    drafting = worker.decode_speed(Chains(monkeypatch), 1, 8, 30, 3, 50_000, drafts=drafts)
    without = {f"decode_tok_s{spread}": 100.0 for spread in ("", "_low", "_high")}
    args.dtype = "kvarn_k4v2_g128"
    found = speculate._speeds(args, {args.dtype: ({"decode": [without]}, {"decode": [drafting]})}, 0)
    assert found["tok_s"] == pytest.approx(300)
    assert found["gain"] == pytest.approx(3)
    assert ("tokens_a_step" in found) == ("step_ms" in found) == drafts
    if drafts:
        assert found["tokens_a_step"] == pytest.approx(3)
        assert found["step_ms"] == pytest.approx(10)


def test_speed_over_a_text_is_that_of_all_its_pieces(monkeypatch) -> None:
    class Uneven(Chains):
        """An engine that is given texts, and takes twice as long for every other one."""

        def __init__(self, monkeypatch) -> None:
            super().__init__(monkeypatch)
            self.texts: list[list[int]] = []

        def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
            if prompts[0] not in self.texts:
                self.texts.append(prompts[0])
            self.now += (new_tokens + 2) // 3 * (self.texts.index(prompts[0]) % 2)
            return super().generate(prompts, new_tokens)

    engine = Uneven(monkeypatch)
    found = worker.decode_speed(engine, 1, 8, 30, 4, 50_000, text=list(range(20_000)), drafts=True)
    assert [text[0] for text in engine.texts] == [0, 7919, 15838, 3757]
    assert (found["decode_tok_s_low"], found["decode_tok_s_high"]) == pytest.approx((150, 300))
    assert found["decode_tok_s"] == pytest.approx(200)
    assert found["acceptance_length"] == pytest.approx(3)
