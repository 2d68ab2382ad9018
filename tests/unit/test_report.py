"""docs/quality.md: made from the committed rows, and honest about where presets lose."""

import json
from pathlib import Path

import pytest

from kvarn.cli.main import main
from kvarn.errors import KVarNError
from kvarn.evaluation.report import BEGIN, END, insert, losing_cases, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"


def row(method: str, bytes_each: float, kl: float, model: str = "m") -> dict[str, object]:
    figures = {"kl_median": kl, "kl_p99": kl, "top1": 0.9, "ppl": 2.0, "ppl_exact": 2.0}
    named = {"model": model, "text": "t", "tokens": 8, "method": method}
    return {**named, "bytes_per_token_head": bytes_each, "kl_mean": kl, **figures}


def test_a_preset_loses_to_less_kl_at_no_more_bytes_on_the_same_text() -> None:
    ours = row("kvarn_k4v2_g128", 108, 0.3)
    better = row("better", 108, 0.2)
    others = [row("larger", 109, 0.1), row("worse", 100, 0.4), row("fp8-e4m3", 100, 0.1), row("else", 1, 0.1, "other")]
    assert losing_cases([ours, better, *others]) == [(ours, better)]
    assert "`kvarn_k4v2_g128` (0.3000) to better (0.2000)" in tables([ours, better])
    assert "Nowhere" in tables([ours, *others])


def test_only_what_stands_between_the_marks_changes() -> None:
    assert insert(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    with pytest.raises(KVarNError, match="needs the lines"):
        insert("a\n", "new\n")


def test_document_is_made_from_the_committed_rows(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "quality.md").read_text()
    copy = tmp_path / "quality.md"
    copy.write_text(document)
    assert main(["plot", str(RESULTS), str(copy)]) == 0
    assert copy.read_text() == document


@pytest.mark.parametrize("model", ["Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M-Instruct"])
def test_default_preset_has_the_least_kl_of_its_bytes(model: str) -> None:
    rows = [found for found in json.loads(RESULTS.read_text())["rows"] if found["model"] == model]
    (ours,) = (found for found in rows if found["method"] == "kvarn_k4v2_g128")
    assert all(lost[0]["method"] != "kvarn_k4v2_g128" for lost in losing_cases(rows))
    assert ours["kl_mean"] <= 0.020
