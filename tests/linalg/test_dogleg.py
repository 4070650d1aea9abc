"""Dogleg and two-dimensional subspace steps against the plane searched through."""

import math

import pytest
import torch
from linalg_cases import Counted

from imstep.linalg import DenseOperator, KrylovStatus, RelativeResidual, dogleg, two_dimensional_subspace

F64 = torch.float64
ACCURATE = [RelativeResidual(1e-12)]
DEFINITE = torch.logspace(-1, 1, 20)
INDEFINITE = torch.cat([-torch.linspace(0.3, 2.0, 3), torch.logspace(-1, 1, 17)])


def model(matrix, rhs, x):
    return rhs @ x - (x * (matrix @ x)).sum(0) / 2


@pytest.mark.parametrize("radius", [0.05, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_in_a_plane_the_best_is_found(with_spectrum, normal, radius, damping):
    matrix, _ = with_spectrum(DEFINITE)
    rhs = normal(20)
    shifted = matrix + damping * torch.eye(20, dtype=F64)
    newton = torch.linalg.solve(shifted, rhs)
    Q = torch.linalg.qr(torch.stack([rhs, newton], dim=1))[0]
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=F64)
    circle = torch.stack([angle.cos(), angle.sin()])
    best = max((rhs @ (Q @ circle) * r - ((Q @ circle) * (shifted @ Q @ circle)).sum(0) * r * r / 2).max()
               for r in torch.linspace(0, min(radius, newton.norm().item()), 100, dtype=F64))  # fmt: skip
    operator = Counted(matrix)
    result = two_dimensional_subspace(operator, rhs, radius, damping=damping, stopping=ACCURATE)
    assert result.damped_decrease == pytest.approx(float(best), rel=1e-3)
    assert result.damped_decrease >= float(best) * (1 - 1e-9)
    assert result.solution.norm() <= radius * (1 + 1e-9)
    assert (result.status is KrylovStatus.BOUNDARY) == (newton.norm() > radius)
    assert operator.products == result.products
    torch.testing.assert_close(result.image, matrix @ result.solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("radius", [0.05, 1.0, 3.0, 6.0, 1e3])
def test_the_dogleg_follows_its_path(with_spectrum, normal, radius):
    matrix, _ = with_spectrum(DEFINITE)
    rhs = normal(20)
    newton = torch.linalg.solve(matrix, rhs)
    steepest = (rhs @ rhs) / (rhs @ matrix @ rhs) * rhs
    t = torch.linspace(0, 1, 50_001, dtype=F64)
    path = torch.cat([steepest[:, None] * t, steepest[:, None] + (newton - steepest)[:, None] * t], dim=1)
    expected = path[:, path.norm(dim=0) <= radius][:, -1]
    result = dogleg(DenseOperator(matrix), rhs, radius, stopping=ACCURATE)
    torch.testing.assert_close(result.solution, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.image, matrix @ result.solution, rtol=1e-8, atol=1e-8)
    assert result.predicted_decrease == pytest.approx(float(model(matrix, rhs, result.solution)), rel=1e-9)
    if newton.norm() > radius:
        assert result.status is KrylovStatus.BOUNDARY
        assert float(result.solution.norm()) == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize("solve", [dogleg, two_dimensional_subspace])
def test_negative_curvature_is_followed_to_the_boundary(with_spectrum, normal, solve):
    matrix, _ = with_spectrum(INDEFINITE)
    rhs = normal(20)
    operator = Counted(matrix)
    result = solve(operator, rhs, 2.0)
    assert result.products == operator.products
    cauchy = rhs * min(2.0 / rhs.norm(), (rhs @ rhs) / abs(rhs @ matrix @ rhs))
    assert result.status is KrylovStatus.BOUNDARY
    assert float(result.solution.norm()) == pytest.approx(2.0)
    assert result.predicted_decrease >= float(model(matrix, rhs, cauchy))
