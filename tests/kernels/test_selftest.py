"""`kvarn selftest`: its steps agree on this machine, and it tells when they don't."""

import pytest
import torch

from kvarn.cli import selftest
from kvarn.cli.main import main


def test_kernels_and_references_serve_the_same(device, monkeypatch):
    if device == "cpu":
        # fewer tokens for the interpreter, a full tile among them
        monkeypatch.setattr(selftest, "_LENGTHS", (130, 3))
        monkeypatch.setattr(selftest, "_CHUNKS", (20, 5))
    records, outputs = selftest.differences("kvarn_k4v2_g128", 64, "float16", device)
    assert records <= selftest._BYTES_APART
    assert len(outputs) == 2
    assert 0 < max(outputs) <= selftest._OUTPUT_APART


@pytest.mark.parametrize("found", [(0.1, [0.0, 0.0]), (0.0, [0.0, 0.1]), (0.0, [0.0, float("nan")])])
def test_what_differs_fails(found, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selftest, "differences", lambda *_: found)
    assert main(["selftest", "kvarn_k4v2_g128"]) == 1
    assert "kvarn_k4v2_g128" in capsys.readouterr().err


def test_without_a_gpu_there_is_nothing_to_test(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["selftest"]) == 1
    assert "no GPU" in capsys.readouterr().err
