"""docs/quality.md: made from the committed rows, and honest about where presets lose."""

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest

from kvarn.cli.main import main
from kvarn.errors import KVarNError
from kvarn.evaluation.picture import picture
from kvarn.evaluation.report import BEGIN, END, insert, losing_cases, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What docs/quality.md is made from, as far as it has been measured.
MEASURED = [RESULTS / name for name in ("quality.json", "quality-gpu.json", "tasks-gpu.json")]
QWEN = "Qwen2.5-Coder-1.5B-Instruct"
FOUND = [path for path in MEASURED if path.exists()]


def row(method: str, bytes_each: float, kl: float, model: str = "m", **more: object) -> dict[str, object]:
    figures = {"kl_median": kl, "kl_p99": kl, "top1": 0.9, "ppl": 2.0, "ppl_exact": 2.0}
    figures |= {f"kl_quarter_{i}": kl * i for i in range(1, 5)}
    named = {"model": model, "text": "t", "tokens": 8, "model_dtype": "float32", "method": method}
    return {**named, "bytes_per_token_head": bytes_each, "kl_mean": kl, **figures, **more}


def task(dtype: str, right: int, **more: object) -> dict[str, object]:
    named = {"task": "humaneval", "items": 3, "engine": "vllm", "model": "m", "model_dtype": "float16"}
    return {**named, "dtype": dtype, "right": right, **more}


def test_a_preset_loses_to_less_kl_at_no_more_bytes_on_the_same_text() -> None:
    ours = row("kvarn_k4v2_g128", 108, 0.3)
    better = row("better", 108, 0.2)
    others = [row("larger", 109, 0.1), row("worse", 100, 0.4), row("fp8-e4m3", 100, 0.1), row("else", 1, 0.1, "other")]
    others += [row("k4v2:tail=0", 100, 0.1), row("other-dtype", 1, 0.1, model_dtype="float16")]
    assert losing_cases([ours, better, *others]) == [(ours, better)]
    assert "`kvarn_k4v2_g128` (0.3000) to better (0.2000)" in tables([ours, better])
    assert "Nowhere" in tables([ours, *others])


def test_variants_stand_beside_the_preset_and_not_among_methods() -> None:
    made = tables([row("kvarn_k4v2_g128", 108, 0.2), row("k4v2:tail=0", 108, 0.3)])
    assert "| m, t, 8 tokens | k4v2:tail=0 | 108 | 0.30000 | 1.50 |" in made
    assert made.count("k4v2:tail=0") == 1
    assert "What each part is worth" not in tables([row("k4v2:tail=0", 108, 0.3)])


def test_turns_are_shown_in_four_parts() -> None:
    turns = {f"kl_turn_{i}": i / 10 for i in range(1, 9)}
    assert "| 8 | **`kvarn_k4v2_g128`** | 108 | 0.1500 / 0.3500 / 0.5500 / 0.7500 |" in tables(
        [row("kvarn_k4v2_g128", 108, 0.2, **turns)]
    )


def test_tasks_name_what_is_lost_and_won() -> None:
    paired = {"lost": ["HumanEval/7"], "won": [], "p_mcnemar": 1.0}
    made = tables([task("kvarn_k4v2_g128", 2, **paired), task("auto", 3, lost=[], won=[], p_mcnemar=1.0)])
    assert "| `kvarn_k4v2_g128` | 2 of 3 | 1: 7 | 0 | 1 |" in made
    assert made.index("| float16 | 3 of 3 |") < made.index("2 of 3")


def test_only_what_stands_between_the_marks_changes() -> None:
    assert insert(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    with pytest.raises(KVarNError, match="needs the lines"):
        insert("a\n", "new\n")


def test_picture_has_a_panel_a_model_with_its_widest_series() -> None:
    rows = [row("kvarn_k4v2_g128", 108, 0.02), row("other-k4v2", 108, 0.2), row("k4v2:tail=0", 108, 0.3)]
    rows += [row("kvarn_k4v4_g128", 140, 0.01, "n"), row("kvarn_k4v2_g128", 108, 0.5, tokens=9)]
    root = xml.etree.ElementTree.fromstring(picture(rows))
    said = [element.text for element in root.iter() if element.text]
    assert [text for text in said if text.endswith("tokens")] == ["m, t, 8 tokens", "n, t, 8 tokens"]
    points = {text.partition(":")[0]: text for text in said if "bytes, KL" in text}
    assert set(points) == {"kvarn_k4v2_g128", "other-k4v2", "kvarn_k4v4_g128"}
    circles = {c[0].text: float(c.get("cy", "nan")) for c in root.iter() if c.tag.endswith("circle") and len(c)}
    assert circles[points["other-k4v2"]] < circles[points["kvarn_k4v2_g128"]]


def test_document_and_picture_are_made_from_the_committed_rows(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "quality.md").read_text()
    copy = tmp_path / "quality.md"
    copy.write_text(document)
    assert main(["plot", *map(str, FOUND), str(copy)]) == 0
    assert copy.read_text() == document
    assert copy.with_suffix(".svg").read_text() == (ROOT / "docs" / "quality.svg").read_text()


@pytest.mark.parametrize("model", ["Qwen2.5-Coder-0.5B-Instruct", QWEN, "SmolLM2-135M-Instruct"])
def test_default_preset_has_the_least_kl_of_its_bytes(model: str) -> None:
    rows = [found for path in FOUND for found in json.loads(path.read_text())["rows"] if found.get("model") == model]
    rows = [found for found in rows if "method" in found]
    ours = [found for found in rows if found["method"] == "kvarn_k4v2_g128"]
    assert ours
    assert all(lost[0]["method"] != "kvarn_k4v2_g128" for lost in losing_cases(rows))
    assert all(found["kl_mean"] <= 0.020 for found in ours)
