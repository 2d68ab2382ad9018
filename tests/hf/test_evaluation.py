"""The evaluation: its measures on known distributions, and its caches against KVarN's own."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_tile_cache import make_model  # noqa: E402 (after the check)
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402

from benchmarks.quality import layers  # noqa: E402
from kvarn.cli.main import main  # noqa: E402
from kvarn.core.hadamard import rotate_keys  # noqa: E402
from kvarn.errors import KVarNError, UnknownPreset  # noqa: E402
from kvarn.evaluation.divergence import divergence  # noqa: E402
from kvarn.evaluation.layers import cheapest, sensitivity  # noqa: E402
from kvarn.evaluation.methods import Method, gaussian_codebook, methods  # noqa: E402
from kvarn.evaluation.run import Evaluation, check_name, first_divergences  # noqa: E402
from kvarn.evaluation.variants import ABLATION, rotate_strided, variant  # noqa: E402

TOKENS = 600


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The interpreter is too slow for a model."""
    monkeypatch.delenv("KVARN_FORCE_TRITON", raising=False)


def ids(count=TOKENS):
    return torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(1))


def test_divergence_of_known_distributions():
    """Two tokens: exact odds 3:1, changed odds 1:1."""
    exact = torch.tensor([[math.log(3.0), 0.0]]).repeat(8, 1)
    changed = torch.tensor([[0.0, -1e-3]]).repeat(8, 1)
    found = divergence(lambda x: x, exact, changed, torch.zeros(8, dtype=torch.int64), [0, 3])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.kl_mean == pytest.approx(kl, abs=1e-3)
    assert found.kl_p99 == pytest.approx(kl, abs=1e-3)
    assert len(found.kl_quarters) == 4
    assert found.kl_turns == pytest.approx([kl, kl], abs=1e-3)
    assert found.top1 == 1.0
    assert found.ppl_exact == pytest.approx(4 / 3, rel=1e-5)
    assert found.ppl == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("turns", [(0,), (0, 5, 256, 450)])
def test_exact_tiles_change_nothing(turns, monkeypatch):
    exact = Method("nothing", lambda k, v: (k, v), lambda d: 32.0)
    monkeypatch.setattr("kvarn.evaluation.run.methods", lambda: {"nothing": exact})
    row = Evaluation(make_model("sdpa"), ids(), turns=turns).row("nothing")
    assert row["kl_mean"] < 1e-7  # sums in another order
    assert row["top1"] == 1.0
    assert row["ppl"] == pytest.approx(row["ppl_exact"])


@pytest.mark.parametrize("turns", [(0,), (0, 5, 256, 450)])
def test_kvarn_as_a_variant_is_kvarn(turns):
    """The same quantiser through a method's cache and through records, kernels and rings gives the same figures."""
    evaluation = Evaluation(make_model("sdpa"), ids(), turns=turns)
    as_method, as_tiles = evaluation.row("k4v2:"), evaluation.row("kvarn_k4v2_g128")
    compared = ["kl_mean", "kl_quarter_4", *(f"kl_turn_{i}" for i in range(3, len(turns) + 1))]
    assert [as_method[name] for name in compared] == pytest.approx([as_tiles[name] for name in compared], rel=2e-2)
    assert as_method["kl_mean"] > 1e-6
    assert as_method["bytes_per_token_head"] == as_tiles["bytes_per_token_head"]


def test_a_turn_reads_what_is_cached_from_tiles_however_new():
    model = make_model("sdpa")
    alone = Evaluation(model, ids()).row("k2v2:")
    in_turns = Evaluation(model, ids(), turns=(0, 256)).row("k2v2:")
    assert in_turns["kl_turn_2"] > 1.05 * alone["kl_mean"]


@pytest.mark.parametrize("name", [*methods(), *ABLATION, "k2v2:key_refit=1"])
def test_methods_restore_with_the_error_that_their_bits_allow(name):
    method = methods().get(name) or variant(name)
    k, v = torch.randn(2, 1, 2, 128, 64, generator=torch.Generator().manual_seed(0))
    for exact, restored in zip((k, v), method.restore(k, v), strict=True):
        assert restored.shape == exact.shape
        error = float((restored - exact).norm() / exact.norm())
        assert error < 0.62  # a two-bit code of a normal variable
    assert method.bytes_per_token_head(64) < 4 * 64


def test_strided_rotations_are_undone_and_refits_lower_the_error():
    x = torch.randn(3, 128, 192, generator=torch.Generator().manual_seed(0))
    for order in (0, 1, 2, 4, 16):
        again = rotate_strided(rotate_strided(x, order), order, inverse=True)
        torch.testing.assert_close(again, x, atol=1e-5, rtol=1e-5)
    x = x[..., :64]
    torch.testing.assert_close(rotate_strided(x, 4), rotate_keys(x))
    assert torch.equal(rotate_strided(x, 64), rotate_strided(x, 0))
    errors = [float((variant(f"k2v2:key_refit={n}").restore(x, x)[0] - x).norm()) for n in (0, 1)]
    assert errors[1] < errors[0]


def test_codebook_is_lloyd_and_maxs():
    """Max 1960, table I: four levels at 0.4528 and 1.510 standard deviations."""
    assert gaussian_codebook(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=5e-3)


def test_greedy_tokens_are_compared():
    assert first_divergences(make_model(), "kvarn_k8v4_g128", [ids(40)], 5) == [5]


def test_names_are_presets_or_methods():
    check_name("kvarn_k4v2_g128")
    check_name("fp8-e4m3")
    check_name("k4v2:key_order=0,key_clip=0.7")
    with pytest.raises(UnknownPreset, match="kvarn_k4v2_g128"):
        check_name("kvarn_k4v2_g12")
    for wrong in ("k4v2:key=0", "k4:", "k4v2:key_order=many", "k4v2:key_order"):
        with pytest.raises(KVarNError, match="write it like"):
            check_name(wrong)


def saved_model(folder):
    """Save a tiny model whose tokens are words; return a text of 300 of them."""
    words = {chr(97 + i) * n: 26 * (n - 1) + i for i in range(26) for n in range(1, 9)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    make_model("sdpa").save_pretrained(folder)
    return " ".join(list(words)[i] for i in ids(300) % len(words))


def test_command_writes_rows_and_goes_on_where_it_was(tmp_path, capsys):
    text, out, model = tmp_path / "text.txt", tmp_path / "quality.json", tmp_path / "tiny"
    text.write_text(saved_model(model))
    command = ["eval", str(model), "kvarn_k4v2_g128", "--text", str(text), "--out", str(out), "--tokens"]
    assert main([*command, "256", "--generate", "3", "--prompts", "2"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    named = {"model": "tiny", "method": "kvarn_k4v2_g128", "tokens": 256, "bytes_per_token_head": 56.0}
    assert {name: row[name] for name in named} == named
    assert row["first_divergence_median"] <= 3
    assert main([*command, "256"]) == 0
    assert "Nothing is missing" in capsys.readouterr().out
    assert main([*command, "1000"]) == 1
    assert "300 tokens, not 1000" in capsys.readouterr().err
    assert main(["presets"]) == 0
    assert "kvarn_k2v2_g128" in capsys.readouterr().out


def test_layers_get_what_they_mind_least_within_the_budget():
    costs = [[9.0, 1.0, 0.0], [2.0, 1.9, 1.8], [9.0, 8.0, 0.0]]
    assert cheapest(costs, [1, 2, 3], 6) == [1, 0, 2]
    assert cheapest(costs, [1, 2, 3], 9) == [2, 2, 2]
    with pytest.raises(ValueError, match="do not fit"):
        cheapest(costs, [1, 2, 3], 2)


def test_sensitivity_is_that_of_one_layer_alone():
    evaluation = Evaluation(make_model("sdpa"), ids(400))
    first, second = (sensitivity(evaluation, variant("k2v2:"), layer, 2) for layer in range(2))
    assert first > 1e-6
    assert second > 1e-6
    assert first != second
    assert sensitivity(evaluation, variant("k2v2:tail=512"), 0, 2) < 1e-9


def test_choices_by_layer_are_compared_at_the_same_bytes(tmp_path):
    text, out, model = tmp_path / "text.txt", tmp_path / "layers.json", tmp_path / "tiny"
    text.write_text(saved_model(model))
    command = [
        "--model",
        str(model),
        "--text",
        str(text),
        "--out",
        str(out),
        "--tokens",
        "300",
        "--short-tokens",
        "260",
    ]
    layers.main(command)
    rows = json.loads(out.read_text())["rows"]
    chosen = [row for row in rows if "chosen" in row]
    assert [row["chosen"] for row in chosen] == ["uniform", "by layer"] * 2
    assert all(row["bytes_per_token_head"] <= 56 for row in chosen)
    assert len(rows) == len(chosen) + 2 * 2 * 4
    layers.main(command)
    assert json.loads(out.read_text())["rows"] == rows
