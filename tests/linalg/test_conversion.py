"""Matrices of other kinds as operators."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from imstep import spectral
from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    LowRankOperator,
    RelativeResidual,
    as_operator,
    conjugate_gradient,
    lanczos,
)

MATRIX = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SYMMETRIC = MATRIX.mT @ MATRIX + torch.eye(4, dtype=torch.float64)
KINDS = {
    "tensor": lambda m: m,
    "trained": lambda m: m.clone().requires_grad_(),
    "array": Tensor.numpy,
    "array in columns": lambda m: np.asfortranarray(m.numpy()),
    "sparse": lambda m: scipy.sparse.csr_array(m.numpy()),
    "sparse matrix": lambda m: scipy.sparse.coo_matrix(m.numpy()),
    "linear operator": lambda m: scipy.sparse.linalg.aslinearoperator(m.numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_matrix_s(kind: str) -> None:
    A = as_operator(KINDS[kind](MATRIX))
    generator = torch.Generator().manual_seed(1)
    v, V, U = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4,), (4, 3), (6, 2)))
    for found, expected in (
        (A @ v, MATRIX @ v),
        (A @ V, MATRIX @ V),
        (A.T @ U, MATRIX.mT @ U),
        (A.T @ U[:, 0], MATRIX.mT @ U[:, 0]),
        (A.to_dense(), MATRIX),
    ):
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    S = KINDS[kind](SYMMETRIC)
    values = torch.linalg.eigvalsh(SYMMETRIC).flip(0)
    torch.testing.assert_close(spectral.eigenpairs(S, k=2).values, values[:2])
    assert spectral.trace(S).value == pytest.approx(float(values.sum()))
    torch.testing.assert_close(spectral.diagonal(S).value, SYMMETRIC.diagonal())
    assert spectral.frobenius_norm(KINDS[kind](MATRIX)).value == pytest.approx(float(MATRIX.norm()))
    torch.testing.assert_close(spectral.low_rank(S, 4) @ v, SYMMETRIC @ v)
    torch.testing.assert_close(as_operator(S).inverse() @ v, torch.linalg.solve(SYMMETRIC, v))


def test_dtypes_are_kept_and_whole_numbers_are_double() -> None:
    assert as_operator(MATRIX.float()).dtype == torch.float32
    for whole in (torch.eye(3, dtype=torch.int64), np.eye(3, dtype=np.int32), scipy.sparse.eye_array(3, dtype=bool)):
        assert torch.equal(as_operator(whole).to_dense(), torch.eye(3, dtype=torch.float64))
    operator = DiagonalOperator(torch.ones(3))
    assert as_operator(operator) is operator


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", ">i4", np.longdouble])
def test_numbers_as_files_hold_them(dtype: object) -> None:
    whole = np.array([[2.0, 1.0], [1.0, 3.0]]).astype(dtype)
    assert as_operator(whole).to_dense().tolist() == [[2.0, 1.0], [1.0, 3.0]]


@pytest.mark.parametrize("kind", [DenseOperator, lambda m: DiagonalOperator(m[0])])
def test_an_operator_is_of_real_numbers_with_fractions(kind: object) -> None:
    with pytest.raises(TypeError, match="twice the size"):
        kind(SYMMETRIC + 0j)
    with pytest.raises(TypeError, match=r"Convert the matrix by \.double"):
        kind(torch.eye(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="as_operator"):
        kind([[1.0, 2.0], [2.0, 3.0]])
    with pytest.raises(TypeError, match=r"Pass v\.to_dense"):
        DenseOperator(SYMMETRIC) @ torch.ones(4, dtype=torch.float64).to_sparse()


def test_a_stored_matrix_is_a_constant_and_no_solution_has_half_of_its_derivative() -> None:
    matrix, b = SYMMETRIC.clone().requires_grad_(), MATRIX[0].clone().requires_grad_()
    operator = DenseOperator(matrix)
    solved = conjugate_gradient(operator, b.detach(), stopping=[RelativeResidual(1e-12)]).solution
    assert torch.allclose(SYMMETRIC @ solved, b)
    assert not solved.requires_grad
    assert not (operator.inverse() @ b.detach()).requires_grad
    assert not spectral.eigenpairs(operator, k=2).values.requires_grad
    assert not (DiagonalOperator(matrix[0]) @ b.detach()).requires_grad
    assert not LowRankOperator(matrix[:, :2], matrix[0, :2]).to_dense().requires_grad
    (gradient,) = torch.autograd.grad((operator @ b).sum(), b)
    assert torch.allclose(gradient, SYMMETRIC.sum(0))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="make lists a tensor"):
        as_operator([[1.0]])
    for complex_one in (MATRIX.to(torch.complex128), MATRIX.numpy() + 0j, scipy.sparse.csr_array(MATRIX.numpy() + 0j)):
        with pytest.raises(TypeError, match="twice the size"):
            as_operator(complex_one)
    with pytest.raises(ValueError, match="matrix"):
        spectral.trace(torch.ones(3))
    with pytest.raises(ValueError, match="square"):
        spectral.trace(MATRIX)
    with pytest.raises(ValueError, match="not symmetric"):
        spectral.eigenpairs(MATRIX[:4], k=1)
    for solve in (conjugate_gradient, lambda A, b: lanczos(A, b, 2)):
        with pytest.raises(TypeError, match="as_operator"):
            solve(SYMMETRIC, MATRIX[0])
        with pytest.raises(TypeError, match="as_operator"):
            solve(SYMMETRIC.numpy(), MATRIX[0])
