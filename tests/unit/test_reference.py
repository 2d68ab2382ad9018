"""core.reference against an independent float64 implementation in plain loops, and against published figures."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch

from kvarn.core.layout import TileLayout
from kvarn.core.reference import (
    DEFAULT,
    PUBLISHED,
    QuantisedTile,
    Recipe,
    decode_record,
    encode,
    normalise,
    quantise_oriented,
    quantise_tile,
    softmax_attention,
)
from kvarn.presets import PRESETS, Preset, get_preset

Matrix = list[list[float]]
RECIPES = {"default": DEFAULT, "published": PUBLISHED}
# One unit in the last place of fp16, relative; and its smallest step, absolute.
FP16_ULP, FP16_TINY = 2.0**-10, 2.0**-24
# Share of the range that codes span, chosen by KL on a real model: (keys, values) by bits.
CLIPS = {2: (0.80, 0.80), 3: (1.0, 0.85), 4: (1.0, 0.95), 8: (1.0, 1.0)}


def tile(kind: str, rows: int = 64, cols: int = 48, seed: int = 0) -> torch.Tensor:
    """An oriented tile of some character, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "uneven":
        x *= torch.exp(0.6 * torch.randn(rows, 1, generator=generator))
        x *= torch.exp(0.6 * torch.randn(1, cols, generator=generator))
    if kind == "offset rows":
        x += 12.0 * torch.randn(rows, 1, generator=generator)
    if kind == "small":
        x *= 0.02 * torch.exp(torch.randn(1, cols, generator=generator))
    if kind == "outliers":
        x[:, 3] *= 40.0
        x[7] *= 15.0
    return x


KINDS = ("even", "uneven", "offset rows", "small", "outliers")


def spread_64(x: Matrix) -> tuple[list[float], list[float], float]:
    """Sample standard deviations of rows and of columns, and how uneven they are (2 is perfect)."""
    rows = [statistics.stdev(row) for row in x]
    cols = [statistics.stdev(col) for col in zip(*x, strict=True)]
    return rows, cols, max(rows) / max(min(rows), 1e-8) + max(cols) / max(min(cols), 1e-8)


def column_scales_64(x: Matrix, recipe: Recipe) -> list[float]:
    """Column scales of the most even iterate: log-domain rounds, columns first, the identity a candidate."""
    if recipe.scale_free:
        sigma = statistics.stdev([value for row in x for value in row])
        x = [[value / sigma for value in row] for row in x]
    row_log, col_log = [0.0] * len(x), [0.0] * len(x[0])

    def scaled() -> Matrix:
        return [
            [v / math.exp(r + c) for v, c in zip(row, col_log, strict=True)] for row, r in zip(x, row_log, strict=True)
        ]

    def moved(logs: list[float], deviations: list[float]) -> list[float]:
        steps = [math.log(min(max(s, 1e-3), 1e3)) for s in deviations]
        return [min(max(a + b, recipe.log_scale_min), 10.0) for a, b in zip(logs, steps, strict=True)]

    best, best_score = list(col_log), spread_64(x)[2]
    for _ in range(recipe.iterations):
        col_log[:] = moved(col_log, spread_64(scaled())[1])
        row_log[:] = moved(row_log, spread_64(scaled())[0])
        score = spread_64(scaled())[2]
        if score <= best_score * (1.0 - recipe.margin):
            best, best_score = list(col_log), score
    return [math.exp(c) for c in best]


def row_scale_64(row: list[float], bits: int, clip: float) -> tuple[float, float]:
    """Scale and offset by which codes span a share of a row's range, about its centre."""
    low, high = min(row), max(row)
    reach = (high - low) * clip / 2
    return 2 * reach / (2**bits - 1), (low + high) / 2 - reach


def nearest_code_64(value: float, scale: float, offset: float, bits: int) -> int:
    if scale == 0:
        return 0
    return min(range(2**bits), key=lambda code: abs(code * scale + offset - value))


def relative_error(tiles: QuantisedTile, x: torch.Tensor) -> float:
    return float((tiles.restore().double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_column_scales_are_those_of_float64(recipe: Recipe, kind: str) -> None:
    """Up to one factor, by which the record splits the tile's amplitude between rows and columns."""
    x = tile(kind)
    across = quantise_oriented(x, 4, 1.0, recipe).across.double()
    ratio = across / torch.tensor(column_scales_64(x.tolist(), recipe), dtype=torch.float64)
    assert torch.allclose(ratio / ratio.mean(), torch.ones_like(ratio), rtol=0, atol=2 * FP16_ULP)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_row_vectors_and_codes_are_those_of_float64(kind: str, bits: int, clip: float) -> None:
    """Given the stored column scales: scale and offset to an fp16 step, codes the nearest there are."""
    x = tile(kind, seed=bits)
    got = quantise_oriented(x, bits, clip, DEFAULT)
    across = got.across.double().tolist()
    moved = off = 0
    for r, row in enumerate(x.tolist()):
        values = [v / a for v, a in zip(row, across, strict=True)]
        scale, offset = row_scale_64(values, bits, clip)
        assert float(got.scale[r]) == pytest.approx(scale, rel=FP16_ULP, abs=FP16_TINY)
        assert float(got.offset[r]) == pytest.approx(offset, rel=FP16_ULP, abs=FP16_TINY)
        codes = [nearest_code_64(v, float(got.scale[r]), float(got.offset[r]), bits) for v in values]
        moved += sum(abs(a - b) for a, b in zip(codes, got.codes[r].tolist(), strict=True))
        off = max(off, *(abs(a - b) for a, b in zip(codes, got.codes[r].tolist(), strict=True)))
    assert off <= 1
    assert moved <= 0.001 * x.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_error_is_that_of_float64_without_fp16_vectors(kind: str, recipe: Recipe, bits: int) -> None:
    x = tile(kind, seed=2)
    columns = column_scales_64(x.tolist(), recipe)
    error = 0.0
    for row in x.tolist():
        values = [v / c for v, c in zip(row, columns, strict=True)]
        scale, offset = row_scale_64(values, bits, 1.0)
        for v, c in zip(values, columns, strict=True):
            error += ((nearest_code_64(v, scale, offset, bits) * scale + offset - v) * c) ** 2
    ideal = math.sqrt(error) / float(x.double().norm())
    assert relative_error(quantise_oriented(x, bits, 1.0, recipe), x) == pytest.approx(ideal, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_keys_are_scaled_by_channel_and_values_by_token(preset: Preset, head_dim: int) -> None:
    """A record restores ``(code * scale + offset) * across``: rows are channels for K, tokens for V."""
    layout = TileLayout.of(preset, head_dim)
    k, v = (tile("uneven", layout.tile_tokens, head_dim, seed) for seed in (1, 2))
    key, value = quantise_tile(k, v, layout)
    clips = CLIPS[layout.key_bits][0], CLIPS[layout.value_bits][1]
    for got, x, bits, clip in ((key, k.T, layout.key_bits, clips[0]), (value, v, layout.value_bits, clips[1])):
        want = quantise_oriented(x, bits, clip, DEFAULT)
        assert all(
            torch.equal(getattr(got, name), getattr(want, name)) for name in ("codes", "scale", "offset", "across")
        )
    restored = decode_record(encode(k, v, layout), layout)
    assert torch.equal(restored[0], key.restore().T)
    assert torch.equal(restored[1], value.restore())


def published_tile(seed: int) -> torch.Tensor:
    """Log-normal spread of rows and columns whose imbalance is the published example's 36.9."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((128, 128), (128, 1), (1, 128))
    x, rows, cols = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    low, high = 0.0, 1.5
    for _ in range(30):
        middle = (low + high) / 2
        y = x * torch.exp(middle * (rows + cols))
        uneven = sum(float(s.max() / s.min()) for s in (y.std(dim=0), y.std(dim=1)))
        low, high = (middle, high) if uneven < 36.9 else (low, middle)
    return y.float()


@pytest.mark.parametrize(
    ("amplitude", "four_bits", "two_bits"),
    [(0.02, 0.145, 0.751), (0.1, 0.1425, 0.7355), (0.5, 0.098, 0.505), (1.0, 0.097, 0.489)],
)
def test_published_recipe_has_the_published_errors(amplitude: float, four_bits: float, two_bits: float) -> None:
    """Relative errors of the released recipe on a tile of imbalance 36.9, which its floor makes depend on amplitude."""
    tiles = [amplitude * published_tile(seed) for seed in range(6)]
    for bits, published in ((4, four_bits), (2, two_bits)):
        errors = [relative_error(quantise_oriented(x, bits, 1.0, PUBLISHED), x) for x in tiles]
        assert statistics.mean(errors) == pytest.approx(published, rel=0.06)


def test_published_floor_leaves_small_tiles_unnormalised() -> None:
    x = 0.02 * published_tile(0)
    row, col = normalise(x, PUBLISHED)
    assert torch.equal(col, torch.full_like(col, -0.3)) or not col.any()
    plain = Recipe(iterations=0, log_scale_min=-0.3, scale_free=False, margin=0.0, clipped=False)
    errors = [relative_error(quantise_oriented(x, 4, 1.0, recipe), x) for recipe in (PUBLISHED, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("amplitude", [2.0**-12, 0.02, 1.0, 30.0, 2.0**12])
@pytest.mark.parametrize(("bits", "published"), [(4, 0.0972), (2, 0.489)])
def test_default_recipe_has_the_error_without_a_floor_at_any_amplitude(
    amplitude: float, bits: int, published: float
) -> None:
    tiles = [published_tile(seed) for seed in range(6)]
    errors = [relative_error(quantise_oriented(amplitude * x, bits, 1.0, DEFAULT), amplitude * x) for x in tiles]
    assert statistics.mean(errors) == pytest.approx(published, rel=0.06)


def test_published_recipe_is_the_released_one() -> None:
    assert Recipe(iterations=8, log_scale_min=-0.3, scale_free=False, margin=0.0, clipped=False) == PUBLISHED


@pytest.mark.parametrize("kind", KINDS)
def test_default_recipe_evens_out_any_tile(kind: str) -> None:
    """Two is perfect; an iterate that is better by less than the margin of 1 % may be passed over."""
    x = tile(kind, 128, 128)
    x = x / x.std()
    row, col = normalise(x, DEFAULT)
    assert spread_64((x * torch.exp(-row - col)).tolist())[2] < 2.02


def test_even_tile_is_left_as_it_is() -> None:
    """The identity is a candidate, and an iterate must be better by the margin."""
    row, col = normalise(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32), DEFAULT)
    assert not row.any()
    assert not col.any()


EXTREMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "one constant": lambda x: torch.full_like(x, 3.7),
    "constant tokens": lambda x: torch.linspace(-5, 5, x.shape[0])[:, None].expand_as(x),
    "constant channels": lambda x: torch.linspace(-5, 5, x.shape[1]).expand_as(x),
    "one outlier of 10,000": lambda x: x.index_put((torch.tensor(5), torch.tensor(9)), torch.tensor(1e4)),
    "one element": lambda x: torch.zeros_like(x).index_put((torch.tensor(5), torch.tensor(9)), torch.tensor(1.0)),
    "plus and minus the largest fp16": lambda x: torch.sign(x) * 65504.0,
    "fp16 denormals": lambda x: (x * 2e-7).half().float(),
    "one zero token": lambda x: x.index_fill(0, torch.tensor(3), 0.0),
    "one zero channel": lambda x: x.index_fill(1, torch.tensor(3), 0.0),
}
# Two-bit codes keep half of Gaussian noise; everything above is easier, except codes far from an outlier.
_LARGEST_ERROR = 1.0


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
def test_finite_rows_give_finite_values_near_them(
    change: Callable[[torch.Tensor], torch.Tensor], preset: Preset
) -> None:
    layout = TileLayout.of(preset, 64)
    x = change(tile("even", layout.tile_tokens, 64))
    for restored in decode_record(encode(x, x, layout), layout):
        assert torch.isfinite(restored).all()
        assert (restored - x).norm() <= _LARGEST_ERROR * x.norm()


@pytest.mark.parametrize("name", ["zeros", "one constant"])
def test_constant_tiles_are_kept(name: str) -> None:
    layout = TileLayout.of(get_preset("kvarn_k2v2_g128"), 128)
    x = EXTREMES[name](tile("even", 128, 128))
    for restored in decode_record(encode(x, x, layout), layout):
        assert torch.allclose(restored, x, rtol=2 * FP16_ULP, atol=0)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_zero_bytes_restore_to_zeros(preset: Preset) -> None:
    layout = TileLayout.of(preset, 128)
    for restored in decode_record(torch.zeros(2, layout.record_bytes, dtype=torch.uint8), layout):
        assert torch.equal(restored, torch.zeros(2, layout.tile_tokens, 128))


def test_nan_token_harms_only_its_own_tile() -> None:
    layout = TileLayout.of(get_preset("kvarn_k4v2_g64"), 64)
    x = torch.stack([tile("even", 64, 64, seed) for seed in range(3)])
    clean = encode(x[[0, 2]], x[[0, 2]], layout)
    x[1, 5] = float("nan")
    assert torch.equal(encode(x, x, layout)[[0, 2]], clean)


@pytest.mark.parametrize("logit_cap", [0.0, 2.0])
def test_attention_is_that_of_plain_loops(logit_cap: float) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 5, 2, 8, generator=generator, dtype=torch.float64)
    visible = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    out, lse = softmax_attention(q, k, v, visible, 0.7, logit_cap)
    for row in range(2):
        for head in range(4):
            seen = [p for p in range(5) if visible[row, p]]
            logits = [
                0.7 * sum(float(a) * float(b) for a, b in zip(q[row, head], k[p, head // 2], strict=True)) for p in seen
            ]
            logits = [logit_cap * math.tanh(x / logit_cap) for x in logits] if logit_cap else logits
            total = sum(math.exp(x) for x in logits)
            want = [
                sum(math.exp(x) * float(v[p, head // 2, d]) for x, p in zip(logits, seen, strict=True)) / total
                for d in range(8)
            ]
            assert out[row, head].tolist() == pytest.approx(want, abs=1e-12)
            assert float(lse[row, head]) == pytest.approx(math.log(total), abs=1e-12)
    assert not out[2].any()
    assert torch.equal(lse[2], torch.full((4,), -math.inf, dtype=torch.float64))
