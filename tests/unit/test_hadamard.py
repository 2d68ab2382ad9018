"""core.hadamard: the rotation is orthonormal, has an inverse, and treats every row alone."""

import pytest
import torch

from kvarn.core.hadamard import rotate, rotate_keys, sign_matrix
from kvarn.core.layout import HEAD_DIMS

every_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
POWERS_OF_TWO = tuple(dim for dim in HEAD_DIMS if dim & (dim - 1) == 0)


def rows(count: int, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, head_dim, generator=torch.Generator().manual_seed(head_dim)).to(dtype)


@every_dim
def test_sign_matrix_is_a_hadamard_matrix(head_dim: int) -> None:
    signs = sign_matrix(head_dim)
    assert torch.equal(signs.abs(), torch.ones(head_dim, head_dim))
    assert torch.equal(signs @ signs.T, head_dim * torch.eye(head_dim))
    assert torch.equal(signs.T @ signs, head_dim * torch.eye(head_dim))


@pytest.mark.parametrize("head_dim", POWERS_OF_TWO)
def test_powers_of_two_are_sylvesters(head_dim: int) -> None:
    want = [[(-1.0) ** (i & j).bit_count() for j in range(head_dim)] for i in range(head_dim)]
    assert sign_matrix(head_dim).tolist() == want


@every_dim
def test_rotation_is_the_documented_product(head_dim: int) -> None:
    x = rows(5, head_dim, torch.float64)
    want = x @ sign_matrix(head_dim).double() / head_dim**0.5
    assert torch.allclose(rotate(x), want, rtol=0, atol=1e-13)


@every_dim
def test_rotation_keeps_inner_products(head_dim: int) -> None:
    x = rows(9, head_dim, torch.float64)
    assert torch.allclose(rotate(x) @ rotate(x).T, x @ x.T, rtol=1e-13, atol=1e-11)


@every_dim
@pytest.mark.parametrize("inverse_first", [False, True])
def test_inverse_undoes_the_rotation(head_dim: int, inverse_first: bool) -> None:
    x = rows(7, head_dim)
    back = rotate(rotate(x, inverse=inverse_first), inverse=not inverse_first)
    assert torch.allclose(back, x, rtol=0, atol=4e-6)
    assert not torch.allclose(rotate(x), x, atol=0.1)


@pytest.mark.parametrize("head_dim", [96, 192])
def test_inverse_is_not_the_rotation_where_the_matrix_is_not_symmetric(head_dim: int) -> None:
    x = rows(3, head_dim)
    assert not torch.allclose(rotate(x), rotate(x, inverse=True), atol=0.1)


@every_dim
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_row_has_the_same_bits_in_any_batch(head_dim: int, dtype: torch.dtype) -> None:
    x = rows(65, head_dim, dtype)
    whole = rotate(x)
    assert all(torch.equal(rotate(x[i : i + 1])[0], whole[i]) for i in (0, 1, 31, 64))
    assert torch.equal(rotate(x[3:20]), whole[3:20])
    assert torch.equal(rotate(x.view(5, 13, head_dim)).flatten(0, 1), whole)
    assert torch.equal(rotate(x.repeat(1, 2)[:, :head_dim]), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_is_float32_of_the_exact_input(dtype: torch.dtype) -> None:
    x = rows(4, 128, dtype)
    assert rotate(x).dtype == torch.float32
    assert torch.equal(rotate(x), rotate(x.float()))
    assert rotate(x.double()).dtype == torch.float64


def test_nan_stays_in_its_row() -> None:
    x = rows(3, 64)
    x[1, 5] = float("nan")
    assert torch.isfinite(rotate(x)[[0, 2]]).all()
    assert torch.isnan(rotate(x)[1]).all()


@pytest.mark.parametrize("head_dim", [80, 112, 36])
def test_impossible_head_dim_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim {head_dim} has no Hadamard matrix"):
        sign_matrix(head_dim)


@every_dim
def test_keys_are_rotated_in_fours(head_dim: int) -> None:
    """Channel i with i + D/4, i + D/2 and i + 3D/4, by the matrix of order four, which is its own inverse."""
    x = torch.randn(3, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(head_dim))
    quarter = head_dim // 4
    matrix = torch.kron(sign_matrix(4).double(), torch.eye(quarter, dtype=torch.float64)) / 2
    assert torch.allclose(rotate_keys(x), x @ matrix, rtol=0, atol=1e-13)
    assert torch.allclose(rotate_keys(rotate_keys(x)), x, rtol=0, atol=1e-13)
    assert rotate_keys(x.half()).dtype == torch.float32
