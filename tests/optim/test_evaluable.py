"""Trial points at which the closure raises an error of linear algebra: the trial has failed, as with nan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from imstep.globalization import Armijo, StrongWolfe
from imstep.optim import ExactHessian, LeastSquares, NewtonKrylov

F64 = torch.float64


class NotPSDError(Exception):
    """As that of gpytorch's linear operators."""


class Wrapped(Exception):
    """What a library may put in place of an error."""


@torch.jit.script
def scripted(covariance: Tensor) -> Tensor:
    return torch.linalg.cholesky(covariance)


def refusing(error: Exception) -> Callable[[Tensor], Tensor]:
    def factor(covariance: Tensor) -> Tensor:
        if float(torch.linalg.eigvalsh(covariance.detach())[0]) <= 0:
            raise error
        return torch.linalg.cholesky(covariance)

    return factor


def wrapped(covariance: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(covariance)
    except RuntimeError as error:
        raise Wrapped from error


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": torch.linalg.cholesky,
    "numpy": refusing(np.linalg.LinAlgError("Matrix is not positive definite")),
    "gpytorch": refusing(NotPSDError("Matrix not positive definite after repeatedly adding jitter")),
    "TorchScript": scripted,
    "another error": wrapped,
    "distribution": lambda covariance: MultivariateNormal(torch.zeros(2, dtype=F64), covariance).scale_tril,
}


def covariance(w: Tensor) -> Tensor:
    return torch.stack([torch.stack([1 + 0 * w, w]), torch.stack([w, 1 + 0 * w])])


class Counter:
    """A closure that counts what goes wrong."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self.loss, self.failures = loss, 0

    def __call__(self) -> Tensor:
        try:
            return self.loss()
        except Exception:
            self.failures += 1
            raise


@pytest.mark.parametrize("step", [None, Armijo(), StrongWolfe()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", FACTORS)
def test_newton_shortens_the_step(name: str, step: object) -> None:
    """A barrier, -log det [[1, w], [w, 1]], that is small against the slope: full steps overshoot w = 1."""
    w = nn.Parameter(torch.tensor(0.0, dtype=F64))
    closure = Counter(lambda: -100 * w - 0.1 * FACTORS[name](covariance(w)).diagonal().log().sum())
    optimizer = NewtonKrylov([w], curvature=ExactHessian(), step=step)
    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert closure.failures > 0
    assert losses == sorted(losses, reverse=True)
    # 100 = 0.1 w / (1 - w²)
    assert float(w) == pytest.approx(0.99950012, abs=1e-6)


@pytest.mark.parametrize("name", FACTORS)
def test_least_squares_takes_more_damping(name: str) -> None:
    """sqrt(1 - w²) = 0.05 from w = 0.6: a Gauss-Newton step leads to w = 1.6."""
    w = nn.Parameter(torch.tensor(0.6, dtype=F64))
    closure = Counter(lambda: (FACTORS[name](covariance(w))[1, 1] - 0.05).square())
    optimizer = LeastSquares([w])
    for _ in range(30):
        optimizer.step(closure)
    assert closure.failures > 0
    assert float(w) == pytest.approx((1 - 0.05**2) ** 0.5)


@pytest.mark.parametrize("make", [NewtonKrylov, LeastSquares])
def test_first_evaluation_raises(make: Callable[..., NewtonKrylov | LeastSquares]) -> None:
    w = nn.Parameter(torch.tensor(1.5, dtype=F64))
    optimizer = make([w])
    with pytest.raises(torch.linalg.LinAlgError):
        optimizer.step(lambda: torch.linalg.cholesky(covariance(w)).square().sum())
    assert float(w) == 1.5


@pytest.mark.parametrize("make", [NewtonKrylov, LeastSquares])
@pytest.mark.parametrize("error", [KeyError("name"), RuntimeError("out of memory"), ValueError("shapes differ")])
def test_other_errors_are_raised_and_undone(make: Callable[..., NewtonKrylov | LeastSquares], error: Exception) -> None:
    w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=F64))
    optimizer = make([w])

    def closure() -> Tensor:
        if float(w[0]) != 0:
            raise error
        return (w - 3).square().sum()

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert w.tolist() == [0, 1]


def test_scale_of_a_distribution() -> None:
    x = torch.tensor([1.0, 1.5, 2.5], dtype=F64)
    w = nn.Parameter(torch.tensor([0.0, 5.0], dtype=F64))
    closure = Counter(lambda: -Normal(w[0], w[1]).log_prob(x).mean())
    optimizer = NewtonKrylov([w], curvature=ExactHessian(), step=Armijo())
    for _ in range(30):
        optimizer.step(closure)
    assert w.tolist() == pytest.approx([float(x.mean()), float(x.std(correction=0))])
