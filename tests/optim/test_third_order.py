"""Chebyshev's, Halley's and super-Halley's steps: closed forms, order three, safeguards."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import F64, fitted_order, normal
from torch import Tensor, nn

from imstep import NewtonKrylov, methods
from imstep.globalization import FixedStep
from imstep.optim import ChebyshevHalley, ResidualForcing

A = normal(5, 5, seed=3)


def bowl(w: Tensor) -> Tensor:
    """Smooth, convex, coupled, with a minimum that is no round number."""
    return torch.exp(A @ w / 3).sum() + (w**2).sum() + (w**4).sum() / 4


def third(f: object, w: Tensor) -> Tensor:
    return torch.func.jacfwd(torch.func.hessian(f))(w)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_step_is_the_dense_formula(alpha: float) -> None:
    w = nn.Parameter(0.3 * normal(5, seed=1))
    at = w.detach().clone()
    H, T, g = torch.func.hessian(bowl)(at), third(bowl, at), torch.func.grad(bowl)(at)
    d1 = -torch.linalg.solve(H, g)
    bent = torch.einsum("ijk,k->ij", T, d1)
    expected = d1 - torch.linalg.solve(H + alpha * bent, bent @ d1) / 2
    optimizer = methods.halley([w], alpha, forcing=ResidualForcing(eta=1e-13, power=2), step=FixedStep())
    optimizer.step(lambda: bowl(w))
    torch.testing.assert_close(w.detach() - at, expected, rtol=1e-9, atol=1e-12)
    record = optimizer.last_step
    assert record.curvature == pytest.approx(float(expected @ H @ expected), rel=1e-9)
    assert record.cost.third_derivatives == (1 if alpha == 0 else 6)


@pytest.mark.parametrize(("alpha", "formula"), [
    (0.0, lambda n, L: n * (1 + L / 2)),
    (0.5, lambda n, L: n / (1 - L / 2)),
    (1.0, lambda n, L: n * (1 + L / 2 / (1 - L))),
])  # fmt: skip
def test_in_one_dimension_it_is_the_classical_iteration(alpha: float, formula: object) -> None:
    """For a root of f': with L = f' f''' / f''², x <- x - (f'/f'') times the method's factor."""
    w, x = nn.Parameter(torch.tensor([0.3], dtype=F64)), 0.3
    optimizer = methods.halley([w], alpha, forcing=ResidualForcing(eta=1e-15, power=2), step=FixedStep())
    for _ in range(3):
        g, h, t = math.exp(x) - 1 + x**3, math.exp(x) + 3 * x**2, math.exp(x) + 6 * x
        x -= formula(g / h, g * t / h**2)
        optimizer.step(lambda: (w.exp() - w + w**4 / 4).sum())
        assert float(w.detach()) == pytest.approx(x, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_convergence_is_cubic(alpha: float, n: int) -> None:
    """Orders need more digits than two steps leave in float64: steps from points at known distances to the minimum."""
    f = bowl if n == 5 else lambda w: (w.exp() - 2 * w + w**4 / 4).sum()
    w = nn.Parameter(torch.zeros(n, dtype=F64))
    finder = methods.newton([w])
    for _ in range(30):
        finder.step(lambda: f(w))
    minimum, direction = w.detach().clone(), normal(n, seed=7)
    errors = []
    for distance in (0.08, 0.04, 0.02, 0.01):
        with torch.no_grad():
            w.copy_(minimum + distance * direction)
        optimizer = methods.halley([w], alpha, forcing=ResidualForcing(eta=1e-13, power=2))
        optimizer.step(lambda: f(w))
        errors.append(float((w.detach() - minimum).norm()))
    slope = math.log(errors[0] / errors[-1]) / math.log(8)
    assert 2.7 < slope < 3.5


@pytest.mark.parametrize("name", ["halley", "chebyshev"])
def test_the_method_itself_needs_fewer_steps_than_newton(name: str) -> None:
    steps = {}
    for method in (name, "newton"):
        w = nn.Parameter(1.5 * normal(5, seed=1))
        optimizer = getattr(methods, method)([w])
        norms = []
        while not norms or norms[-1] > 1e-11:
            optimizer.step(lambda w=w: bowl(w))
            norms.append(optimizer.last_step.gradient_norm)
            assert len(norms) < 30
        steps[method] = len(norms)
        if method == name:
            assert fitted_order(norms) > 2.2
    assert steps[name] < steps["newton"]


def test_weight_decay_bends_nothing() -> None:
    moves = []
    for decay in (0.0, 0.7):
        w = nn.Parameter(0.3 * normal(5, seed=1))
        rest = 0.0 if decay else 0.35
        optimizer = methods.chebyshev([w], weight_decay=decay, step=FixedStep())
        optimizer.step(lambda w=w, rest=rest: bowl(w) + rest * (w**2).sum())
        moves.append(w.detach().clone())
    torch.testing.assert_close(*moves, rtol=1e-10, atol=1e-12)


def test_a_correction_that_is_too_long_is_left_out() -> None:
    """Near an inflexion T d₁ outweighs the curvature: f = w³/3 + w⁴/4 has f'' = 0.0203 at 0.01."""
    w = nn.Parameter(torch.tensor([0.01, 1.0], dtype=F64))
    optimizer = NewtonKrylov([w], solver=ChebyshevHalley(0.0))
    for _ in range(60):
        optimizer.step(lambda: (w**3 / 3 + w**4 / 4).sum())
    torch.testing.assert_close(w.detach(), torch.tensor([-1.0, -1.0], dtype=F64), rtol=0, atol=1e-6)


def test_alpha_is_checked() -> None:
    with pytest.raises(ValueError, match=r"alpha, .* in \[0, 1\], got 2"):
        ChebyshevHalley(2.0)
    with pytest.raises(ValueError, match=r"power, .* positive, got 0"):
        ResidualForcing(power=0.0)
