"""Damped least squares with a penalty, against rows that are written out."""

from __future__ import annotations

import pytest
import torch

from imstep.linalg import (
    DenseFactorisation,
    DenseRows,
    PivotedCholesky,
    RandomizedNystrom,
    RidgeLeastSquares,
    ThinFactorisation,
)

F64 = torch.float64
EXACT = [DenseFactorisation(), ThinFactorisation()]
FEW = [PivotedCholesky(most=1.0), RandomizedNystrom()]


def case(count, size, *, decay=0.5):
    generator = torch.Generator().manual_seed(count * size)
    matrix = torch.randn(count, size, generator=generator, dtype=F64) * decay ** torch.arange(size)
    return matrix, *(torch.randn(n, generator=generator, dtype=F64) for n in (count, size, size))


def expected(matrix, residuals, factors, at, total, d):
    """From d: the minimiser of ‖ρ + Jδ‖² + Σ c (x + d + δ)² + Σ (T - c)(d + δ)², by its normal equations."""
    gradient = matrix.mT @ residuals + factors * (at + d) + (total - factors) * d
    return -torch.linalg.solve(matrix.mT @ matrix + total * torch.eye(len(d), dtype=F64), gradient)


@pytest.mark.parametrize("factorisation", EXACT)
@pytest.mark.parametrize("shape", [(5, 8), (9, 4)])
@pytest.mark.parametrize("factors", [0.3, [0.3, 0.0, 0.1, 0.2]])
def test_the_step_with_rows(factorisation, shape, factors):
    matrix, residuals, at, d = case(*shape)
    c = torch.tensor(factors, dtype=F64).repeat(2)[: shape[1]] if isinstance(factors, list) else 0 * at + factors
    rows = DenseRows(matrix)
    ridge = RidgeLeastSquares(rows, factorisation.of(rows, 0.0, draw=0), c, at, more=0.3)
    for start in (0 * d, d):
        found = ridge.solve(residuals, start, 0.01)
        torch.testing.assert_close(found, expected(matrix, residuals, c, at, 0.31, start), rtol=1e-8, atol=1e-10)
    by = 0.1 * d
    found = ridge.moved(by).solve(residuals, d, 0.01)
    torch.testing.assert_close(found, expected(matrix, residuals, c, at + by, 0.31, d), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factorisation", FEW)
def test_few_rows(factorisation):
    """Steps descend, and vanish where the gradient does; with a tolerance of nothing they are exact."""
    matrix, residuals, at, d = case(80, 100, decay=0.6)
    c, rows = torch.full((100,), 0.05, dtype=F64), DenseRows(matrix)
    ridge = RidgeLeastSquares(rows, factorisation.of(rows, 0.05, draw=0), c, at, more=0.05)
    assert ridge._space.reduced.rank < 40
    gradient = matrix.mT @ residuals + c * at
    assert float(gradient @ ridge.solve(residuals, 0 * d, 1e-3)) < 0
    stationary = RidgeLeastSquares(rows, ridge._space, c, -(matrix.mT @ residuals) / c, more=0.05)
    assert float(stationary.solve(residuals, 0 * d, 1e-3).norm()) < 1e-6 * float(stationary._at.norm())
    exact = RidgeLeastSquares(rows, factorisation.of(rows, 1e-13, draw=0), c, at, more=0.05)
    target = expected(matrix, residuals, c, at, 0.051, d)
    torch.testing.assert_close(exact.solve(residuals, d, 1e-3), target, rtol=1e-4, atol=1e-5)
