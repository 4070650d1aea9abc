"""Least squares by singular values, and within bounds, against dense algebra and SciPy."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch import Tensor

from imstep.linalg import BoxLeastSquares, DenseRows, PivotedCholesky, ThinLeastSquares, box_least_squares

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_step_is_that_of_the_normal_equations(shape: tuple[int, int]) -> None:
    J, residuals, damping = normal(*shape), normal(shape[0], seed=1), 0.1
    thin, other = ThinLeastSquares(J), PivotedCholesky(most=1).of(DenseRows(J), 0.0, draw=0)
    u = thin.solve(residuals, torch.zeros(thin.rank, dtype=F64), damping)
    expected = -torch.linalg.solve(J.mT @ J + damping * torch.eye(shape[1], dtype=F64), J.mT @ residuals)
    torch.testing.assert_close(thin.vector(u), expected)
    torch.testing.assert_close(thin.image(u), J @ expected)
    v = other.reduced.solve(residuals, torch.zeros(other.reduced.rank, dtype=F64), damping)
    torch.testing.assert_close(other.vector(v), expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(12, 5), (30, 20), (4, 8)])
def test_bounded_least_squares_beside_scipy(seed: int, shape: tuple[int, int]) -> None:
    A, b = normal(*shape, seed=seed), 3 * normal(shape[0], seed=seed + 100)
    lower, upper = -normal(shape[1], seed=seed + 200).abs(), normal(shape[1], seed=seed + 300).abs()
    lower[0], upper[1], upper[2] = -torch.inf, torch.inf, lower[2]
    x = box_least_squares(A, b, 1e-3, lower, upper)
    stacked = torch.cat([A, 1e-3**0.5 * torch.eye(shape[1], dtype=F64)])
    right = torch.cat([b, torch.zeros(shape[1], dtype=F64)])
    free = torch.arange(shape[1]) != 2  # SciPy takes no equal bounds
    found = scipy.optimize.lsq_linear(
        stacked[:, free], right - stacked[:, 2] * lower[2], (lower[free], upper[free]), method="bvls", tol=1e-14
    )
    torch.testing.assert_close(x[free], torch.from_numpy(found.x), rtol=1e-8, atol=1e-9)
    assert x[2] == lower[2]
    assert ((x >= lower) & (x <= upper)).all()


def test_correction_in_a_box() -> None:
    """From any coordinates to the same minimiser, for the residuals that a linear function has there."""
    J, residuals, room = normal(9, 4), 5 * normal(9, seed=1), torch.full((4,), 0.4, dtype=F64)
    boxed = BoxLeastSquares(J, -room, room)
    start = 0.3 * torch.sign(normal(4, seed=2))
    first = boxed.solve(residuals, torch.zeros(4, dtype=F64), 0.1)
    again = start + boxed.solve(residuals + J @ start, start, 0.1)
    torch.testing.assert_close(first, again)
    assert first.abs().max() == 0.4
    torch.testing.assert_close(first, box_least_squares(J, -residuals, 0.1, -room, room))
