"""Partial Cholesky factorisation and damped least squares within its span, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imstep.linalg import DenseGram, PartialCholesky, ReducedLeastSquares, partial_cholesky

F64 = torch.float64


def rows_with(singular_values: Tensor, count: int, size: int, seed: int = 0) -> Tensor:
    """(count, size) with given singular values, as many as there are."""
    generator = torch.Generator().manual_seed(seed)
    k = len(singular_values)
    left, _ = torch.linalg.qr(torch.randn(count, k, generator=generator, dtype=F64))
    right, _ = torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=F64))
    return left * singular_values @ right.T


def decaying(count: int = 150, size: int = 300) -> Tensor:
    return rows_with(torch.logspace(2, -8, 100, dtype=F64), count, size)


def missing(rows: Tensor, found: PartialCholesky) -> Tensor:
    return rows @ rows.T - found.factor @ found.factor.T


@pytest.mark.parametrize("tolerance", [1e2, 1.0, 1e-3, 1e-8])
def test_leaves_less_than_the_tolerance(tolerance: float) -> None:
    rows = decaying()
    found = partial_cholesky(DenseGram(rows @ rows.T), tolerance)
    left = missing(rows, found)
    assert found.remainder <= tolerance
    assert left.trace() <= tolerance + 1e-10
    assert torch.linalg.eigvalsh(left).min() >= -1e-10
    assert found.rank <= len(found.pivots) < 100


def test_rank_follows_the_spectrum() -> None:
    """The best rank for a remainder of t is the number of eigenvalues down to where the rest adds up to t."""
    rows = decaying()
    values = torch.linalg.eigvalsh(rows @ rows.T).flip(0)
    rest = values.sum() - values.cumsum(0)
    for tolerance in (1.0, 1e-3):
        best = int((rest > tolerance).sum()) + 1
        found = partial_cholesky(DenseGram(rows @ rows.T), tolerance)
        assert best <= found.rank <= 2 * best + 48


def test_is_the_jacobian_in_an_orthonormal_basis() -> None:
    rows = decaying()
    found = partial_cholesky(DenseGram(rows @ rows.T), 1e-2)
    basis = rows[found.pivots].T @ found.combination
    torch.testing.assert_close(basis.T @ basis, torch.eye(found.rank, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.factor, rows @ basis)


def test_goes_on_to_the_rank_that_rounding_allows() -> None:
    rows = rows_with(torch.ones(7, dtype=F64), 40, 60)
    found = partial_cholesky(DenseGram(rows @ rows.T), 0.0)
    assert found.rank == 7
    assert missing(rows, found).abs().max() < 1e-12


def test_full_rank() -> None:
    rows = rows_with(torch.linspace(1, 2, 60, dtype=F64), 60, 80)
    found = partial_cholesky(DenseGram(rows @ rows.T), 0.0)
    assert sorted(found.pivots.tolist()) == list(range(60))
    assert missing(rows, found).abs().max() < 1e-12


def test_repeated_rows_and_zeros() -> None:
    rows = torch.cat([decaying()[:20]] * 3)
    rows[5] = 0
    found = partial_cholesky(DenseGram(rows @ rows.T), 1e-6)
    assert found.rank == 20
    assert missing(rows, found).trace() <= 1e-6 + 1e-10


def test_nothing_to_take() -> None:
    for tolerance in (0.0, 1.0):
        found = partial_cholesky(DenseGram(torch.zeros(5, 5)), tolerance)
        assert (found.rank, found.remainder, found.factor.shape) == (0, 0.0, (5, 0))


def test_refuses_a_negative_tolerance() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        partial_cholesky(DenseGram(torch.eye(2)), -1.0)


@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 10**6), st.sampled_from([0.0, 1e-8, 1e-2]))
@settings(max_examples=30, deadline=None)
def test_any_shape(count: int, size: int, seed: int, tolerance: float) -> None:
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    found = partial_cholesky(DenseGram(rows @ rows.T), tolerance)
    assert missing(rows, found).abs().max() <= max(tolerance, 1e-9)


# --- damped least squares ---------------------------------------------------------------------------------------------


def dense_step(rows: Tensor, residuals: Tensor, damping: float) -> Tensor:
    normal = rows.T @ rows + damping * torch.eye(rows.shape[1], dtype=F64)
    return -torch.linalg.solve(normal, rows.T @ residuals)


def step_of(rows: Tensor, found: PartialCholesky, reduced: ReducedLeastSquares, coordinates: Tensor) -> Tensor:
    return rows[found.pivots].T @ reduced.weights(coordinates)


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("share", [1e-6, 1e-2, 1.0])
def test_step_is_that_of_levenberg_and_marquardt(damping: float, share: float) -> None:
    """What a remainder of share · λ leaves out of the step is of the order of the share's square root."""
    rows, residuals = decaying(), torch.randn(150, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = partial_cholesky(DenseGram(rows @ rows.T), share * damping)
    reduced = ReducedLeastSquares(found)
    u = reduced.solve(residuals, torch.zeros(found.rank, dtype=F64), damping)
    step, exact = step_of(rows, found, reduced, u), dense_step(rows, residuals, damping)
    assert (step - exact).norm() <= max(share**0.5, 5e-3) * exact.norm()
    torch.testing.assert_close(step.norm(), u.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(reduced.image(u), rows @ step, rtol=1e-5, atol=1e-6)


def test_is_optimal_within_its_span_however_large_the_tolerance() -> None:
    rows, residuals = decaying(), torch.randn(150, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = partial_cholesky(DenseGram(rows @ rows.T), 1e3)
    reduced, damping = ReducedLeastSquares(found), 0.1
    step = step_of(rows, found, reduced, reduced.solve(residuals, torch.zeros(found.rank, dtype=F64), damping))
    basis = rows[found.pivots].T @ found.combination
    gradient = rows.T @ (residuals + rows @ step) + damping * step
    assert (basis.T @ gradient).norm() < 1e-8 * (rows.T @ residuals).norm()


def test_goes_on_from_coordinates() -> None:
    """One correction leads from any start to the minimiser, since the problem is quadratic."""
    rows, residuals = decaying(), torch.randn(150, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = partial_cholesky(DenseGram(rows @ rows.T), 1e-6)
    reduced = ReducedLeastSquares(found)
    best = reduced.solve(residuals, torch.zeros(found.rank, dtype=F64), 0.1)
    start = torch.randn(found.rank, generator=torch.Generator().manual_seed(2), dtype=F64)
    torch.testing.assert_close(start + reduced.solve(residuals + reduced.image(start), start, 0.1), best)


def test_no_damping_of_a_singular_system() -> None:
    rows = rows_with(torch.tensor([1.0, 1e-7], dtype=F64), 10, 20)
    found = partial_cholesky(DenseGram(rows @ rows.T), 0.0)
    u = ReducedLeastSquares(found).solve(torch.ones(10, dtype=F64), torch.zeros(found.rank, dtype=F64), 0.0)
    assert bool(u.isfinite().all())
