"""The published recipe, as released: variance normalisation over tokens and channels, then rounding from end to end.

Mueller et al., "KVarN: Variance-Normalized KV-Cache Quantization", arXiv 2606.03458, sections on variance normalisation
and rounding. The yardstick that `core.reference` is measured against.
"""

import torch

from kvarn.core.reference import quantise_rows

ITERATIONS = 8
# Floor of a log scale. It keeps tiles with a standard deviation below 0.74 from being normalised at all.
_LOG_SCALE_MIN = -0.3
_LOG_SCALE_MAX = 10.0
_STD_MIN = 1e-3
_STD_MAX = 1e3


def _imbalance(x: torch.Tensor) -> torch.Tensor:
    """Return how uneven the standard deviations of rows and of columns are; 2 is perfect. [..., 1, 1]."""
    total = torch.zeros((), device=x.device)
    for dim in (-1, -2):
        std = x.std(dim=dim)
        total = total + std.amax(dim=-1) / std.amin(dim=-1).clamp_min(1e-8)
    return total[..., None, None]


def normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find row and column scales that even out the standard deviations.

    Args:
        x: [..., rows, cols], float32.

    Returns:
        Log scales of rows [..., rows, 1] and of columns [..., 1, cols] of the most even iterate, identity included.
    """
    row = torch.zeros_like(x[..., :, :1])
    col = torch.zeros_like(x[..., :1, :])
    best_row, best_col, best = row, col, _imbalance(x)
    for _ in range(ITERATIONS):
        std = (x * torch.exp(-row) * torch.exp(-col)).std(dim=-2, keepdim=True).clamp(_STD_MIN, _STD_MAX)
        col = (col + torch.log(std)).clamp(_LOG_SCALE_MIN, _LOG_SCALE_MAX)
        std = (x * torch.exp(-row) * torch.exp(-col)).std(dim=-1, keepdim=True).clamp(_STD_MIN, _STD_MAX)
        row = (row + torch.log(std)).clamp(_LOG_SCALE_MIN, _LOG_SCALE_MAX)
        score = _imbalance(x * torch.exp(-row) * torch.exp(-col))
        better = score <= best
        best_row, best_col = torch.where(better, row, best_row), torch.where(better, col, best_col)
        best = torch.where(better, score, best)
    return best_row, best_col


def restore_oriented(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantise an oriented tile and restore it: a scale and an offset a row, a scale a column, all in fp16.

    Args:
        x: [..., rows, cols], float32, already rotated. Keys: rows are channels. Values: rows are tokens.
        bits: width of a code.
    """
    _, col = normalise(x)
    across = torch.exp(col).half().float()
    return quantise_rows(x / across, bits, 1.0).restore() * across


def bytes_of_tile(tokens: int, channels: int, key_bits: int, value_bits: int) -> int:
    """Return the bytes of a tile's codes and of its six vectors."""
    return tokens * channels * (key_bits + value_bits) // 8 + 2 * 3 * (tokens + channels)
