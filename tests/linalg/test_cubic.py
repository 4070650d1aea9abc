"""The cubic subproblem: the conditions of a global solution, the hard case, the Krylov space."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Counted

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    ProductBudget,
    RelativeResidual,
    cubic_regularization,
    dense_cubic_regularization,
)

F64 = torch.float64
DEFINITE = torch.logspace(-2, 1, 40)
INDEFINITE = torch.cat([-torch.linspace(0.3, 2.0, 4), torch.logspace(-2, 1, 36)])


def assert_global(matrix, rhs, sigma, result, damping=0.0, accuracy=1e-9):
    x, mu = result.solution, result.multiplier
    shifted = matrix + (damping + mu) * torch.eye(len(rhs), dtype=F64)
    assert mu == pytest.approx(sigma * x.norm().item(), rel=1e-9)
    assert (rhs - shifted @ x).norm() <= accuracy * max(rhs.norm().item(), mu * x.norm().item())
    assert torch.linalg.eigvalsh(shifted)[0] >= -accuracy * matrix.norm()
    undamped = (rhs @ x - x @ matrix @ x / 2).item()
    assert result.predicted_decrease == pytest.approx(undamped, rel=1e-9)
    held = undamped - damping * (x @ x).item() / 2 - sigma * x.norm().item() ** 3 / 3
    assert result.decreases[-1] == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize("values", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("sigma", [1e-6, 0.1, 1e3])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_the_solution_is_global(with_spectrum, normal, values, sigma, damping):
    matrix, _ = with_spectrum(values)
    operator, rhs = Counted(matrix), normal(40)
    exact = dense_cubic_regularization(DenseOperator(matrix), rhs, sigma, damping=damping)
    assert_global(matrix, rhs, sigma, exact, damping)
    result = cubic_regularization(operator, rhs, sigma, damping=damping, stopping=[RelativeResidual(1e-9)])
    assert result.status is KrylovStatus.CONVERGED
    assert_global(matrix, rhs, sigma, result, damping, accuracy=1e-8)
    assert result.decreases[-1] == pytest.approx(exact.decreases[-1], rel=1e-9)
    assert result.products == operator.products


def test_every_iterate_is_the_best_of_its_krylov_space(with_spectrum, normal):
    matrix, _ = with_spectrum(INDEFINITE)
    rhs = normal(40)
    basis = rhs[:, None]
    for k in range(1, 8):
        basis = torch.linalg.qr(basis)[0]
        projected = basis.T @ matrix @ basis
        best = dense_cubic_regularization(DenseOperator((projected + projected.T) / 2), basis.T @ rhs, 0.3)
        result = cubic_regularization(DenseOperator(matrix), rhs, 0.3, stopping=[ProductBudget(k)])
        torch.testing.assert_close(result.solution, basis @ best.solution, rtol=1e-6, atol=1e-8)
        basis = torch.cat([basis, matrix @ basis[:, -1:]], dim=1)


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_the_hard_case_needs_a_random_vector(normal, sigma):
    values = torch.cat([torch.tensor([-2.0]), torch.linspace(-0.5, 5.0, 30)]).double()
    matrix, rhs = torch.diag(values), normal(31) / 100
    rhs[0] = 0.0
    exact = dense_cubic_regularization(DenseOperator(matrix), rhs, sigma)
    assert exact.multiplier == pytest.approx(2.0)
    assert_global(matrix, rhs, sigma, exact)
    generator = torch.Generator().manual_seed(0)
    result = cubic_regularization(
        DenseOperator(matrix), rhs, sigma, stopping=[RelativeResidual(1e-8)], generator=generator
    )
    assert_global(matrix, rhs, sigma, result, accuracy=1e-7)


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-8, 8), st.floats(-8, 8))
@settings(max_examples=60, deadline=None)
def test_no_unit_matters(seed, n, sigma_power, scale_power):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=F64)
    matrix, rhs = (matrix + matrix.T) * 10**scale_power, torch.randn(n, generator=generator, dtype=F64)
    assert_global(
        matrix, rhs, 10**sigma_power, dense_cubic_regularization(DenseOperator(matrix), rhs, 10**sigma_power), 0.0, 1e-7
    )


def test_arguments_are_checked():
    operator, rhs = DiagonalOperator(torch.ones(3)), torch.ones(3)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma, the weight"):
            cubic_regularization(operator, rhs, sigma)
    assert cubic_regularization(operator, torch.zeros(3), 1.0).solution.tolist() == [0.0, 0.0, 0.0]


def test_no_solution_is_called_one_where_norms_are_beyond_single_precision():
    """Rounding that is infinite was above any residual."""
    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix + matrix.mT
    rhs = torch.randn(20, generator=torch.Generator().manual_seed(1))
    expected = float(dense_cubic_regularization(DenseOperator(2.0**60 * matrix.float()), rhs, 2.0**60).solution.norm())
    found = cubic_regularization(DenseOperator(2.0**60 * matrix.float()), rhs, 2.0**60)
    assert found.status is KrylovStatus.CONVERGED
    assert float(found.solution.norm()) == pytest.approx(expected, rel=1e-3)
