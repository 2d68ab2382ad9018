"""The rotations: orthonormal Hadamard transforms along head_dim, one of values, one of keys and queries.

Values are rotated whole, so that all channels get the same share of a token's outliers.

Keys are rotated in fours: channel i with i + D/4, i + D/2 and i + 3D/4, among them the pair that rotary embedding turns
together. Rotated whole, keys would give every channel the error of the largest, and queries are largest just where keys
are small: with key biases of 158 (Qwen2.5-Coder-0.5B) that leaves eight times the KL (docs/performance-log.md, 20).

Whole rotations of powers of two use Sylvester's construction; 96 and 192 use H_12 x H_8 and H_12 x H_16, with Paley's
matrix of order 12. Every matrix has entries +1 and -1 only and is scaled by 1 / sqrt(head_dim) in float32, because that
scale is not exact in a 16-bit dtype.
"""

import functools
import math

import torch

_PALEY_ORDER = 12
_PALEY_PRIME = 11
_KEY_ORDER = 4


@functools.cache
def _paley_signs() -> torch.Tensor:
    """Return Paley's Hadamard matrix of order 12 (first kind, from the squares modulo 11)."""
    squares = {value * value % _PALEY_PRIME for value in range(1, _PALEY_PRIME)}
    signs = torch.ones(_PALEY_ORDER, _PALEY_ORDER)
    for row in range(_PALEY_PRIME):
        for col in range(_PALEY_PRIME):
            difference = (col - row) % _PALEY_PRIME
            signs[row + 1, col + 1] = 1.0 if difference == 0 or difference in squares else -1.0
        signs[row + 1, 0] = -1.0
    return signs


def _outer_order(head_dim: int) -> int:
    """Return the order of the factor that is no power of two, or 1."""
    return _PALEY_ORDER if head_dim % 3 == 0 else 1


@functools.cache
def sign_matrix(head_dim: int) -> torch.Tensor:
    """Return the +1/-1 matrix M with ``rotate(x) = x @ M / sqrt(head_dim)``.

    Args:
        head_dim: a power of two, or 12 times one.

    Returns:
        [head_dim, head_dim], float32, on the CPU.
    """
    outer = _outer_order(head_dim)
    inner = head_dim // outer
    if inner * outer != head_dim or inner & (inner - 1):
        raise ValueError(f"head_dim {head_dim} has no Hadamard matrix here; use a power of two or 12 times one.")
    signs = _paley_signs() if outer > 1 else torch.ones(1, 1)
    while signs.shape[0] < head_dim:
        signs = torch.kron(signs, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return signs


def rotate(x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the last dimension, in float32 (in float64 if that is what comes in).

    Written with elementwise sums only, so that a row's result doesn't depend on how many rows there are.

    Args:
        x: [..., head_dim], any float dtype.
        inverse: undo the rotation.

    Returns:
        [..., head_dim], float32 or float64.
    """
    head_dim = x.shape[-1]
    outer = _outer_order(head_dim)
    inner = head_dim // outer
    y = (x if x.dtype == torch.float64 else x.float()).reshape(*x.shape[:-1], outer, inner)
    half = 1
    while half < inner:
        y = y.reshape(*x.shape[:-1], outer, inner // (2 * half), 2, half)
        low, high = y.unbind(dim=-2)
        y = torch.stack((low + high, low - high), dim=-2).reshape(*x.shape[:-1], outer, inner)
        half *= 2
    if outer > 1:
        y = _mix_outer(y, _paley_signs().T if inverse else _paley_signs())
    return y.reshape(x.shape) * (1.0 / math.sqrt(head_dim))


def _mix_outer(y: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Multiply the second last dimension by a sign matrix, one row after the other."""
    mixed = torch.zeros_like(y)
    for row in range(signs.shape[0]):
        mixed = mixed + y[..., row : row + 1, :] * signs[row].to(y.device)[:, None]
    return mixed


def rotate_keys(x: torch.Tensor) -> torch.Tensor:
    """Rotate keys or queries along the last dimension, in float32 (in float64 if that is what comes in).

    Its own inverse. Products of a query and a key stay what they are.

    Args:
        x: [..., head_dim], any float dtype; head_dim a multiple of 4.

    Returns:
        [..., head_dim], float32 or float64.
    """
    first, *others = (x if x.dtype == torch.float64 else x.float()).chunk(_KEY_ORDER, dim=-1)
    parts = []
    for row in sign_matrix(_KEY_ORDER).tolist():
        part = first
        for sign, other in zip(row[1:], others, strict=True):
            part = part + sign * other
        parts.append(part)
    return torch.cat(parts, dim=-1) * (1.0 / math.sqrt(_KEY_ORDER))
