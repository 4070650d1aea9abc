"""Saddle-free directions in a Krylov space, against the eigenvalues of the whole matrix."""

import pytest
import torch
from linalg_cases import Counted

from imstep.linalg import AbsoluteEigenvalues, DenseOperator, ProductBudget, dense_solve, saddle_free

INDEFINITE = torch.cat([-torch.linspace(0.3, 2.0, 4), torch.linspace(0.5, 10, 8)])


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_whole_space_gives_the_absolute_values(with_spectrum, normal, damping):
    matrix, _ = with_spectrum(INDEFINITE)
    operator, rhs = Counted(matrix), normal(12)
    result = saddle_free(operator, rhs, damping=damping, stopping=())
    theta, V = torch.linalg.eigh(matrix)
    torch.testing.assert_close(result.solution, V @ ((V.T @ rhs) / (theta.abs() + damping)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.image, matrix @ result.solution, rtol=1e-8, atol=1e-8)
    assert operator.products == result.products <= 12
    if damping == 0:
        exact = dense_solve(DenseOperator(matrix), rhs, indefinite=AbsoluteEigenvalues())
        torch.testing.assert_close(result.solution, exact.solution, rtol=1e-8, atol=1e-8)


def test_a_few_products_give_the_projected_matrix(with_spectrum, normal):
    matrix, _ = with_spectrum(INDEFINITE)
    rhs = normal(12)
    krylov = torch.stack([rhs, matrix @ rhs, matrix @ (matrix @ rhs)], dim=1)
    Q = torch.linalg.qr(krylov)[0]
    theta, V = torch.linalg.eigh(Q.T @ matrix @ Q)
    expected = Q @ V @ ((V.T @ Q.T @ rhs) / theta.abs())
    result = saddle_free(DenseOperator(matrix), rhs, stopping=[ProductBudget(3)])
    torch.testing.assert_close(result.solution, expected, rtol=1e-8, atol=1e-8)
    assert saddle_free(DenseOperator(matrix), rhs, stopping=(), dimension=3).products == 3


def test_squares_of_residuals_may_leave_the_range_of_float32(with_spectrum, normal):
    matrix, _ = with_spectrum(INDEFINITE)
    operator, rhs = DenseOperator(matrix.float()), normal(12).float()
    plain, small = (saddle_free(operator, unit * rhs).solution for unit in (1.0, 2.0**-85))
    torch.testing.assert_close(2.0**85 * small, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("products", [1, 2, 5, 12])
def test_it_descends_from_a_saddle(with_spectrum, normal, products):
    matrix, _ = with_spectrum(INDEFINITE)
    result = saddle_free(DenseOperator(matrix), normal(12), stopping=[ProductBudget(products)])
    assert result.solution @ normal(12) > 0
    assert result.curvature == pytest.approx(float(result.solution @ matrix @ result.solution))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="dimension is at least 1"):
        saddle_free(DenseOperator(torch.eye(2)), torch.ones(2), dimension=0)
