"""The benchmark of drafts: runs that share a folder share its engines, and keep what they found."""

import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.serving import speculate
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
