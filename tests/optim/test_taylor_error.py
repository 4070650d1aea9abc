"""The Taylor error that steps report: of third order for the Hessian, of second for Gauss-Newton."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal, rosenbrock
from torch import Tensor, nn

from imstep.curvature.choice import CurvatureChoice
from imstep.globalization import FixedStep, NoDamping
from imstep.optim import ExactHessian, GaussNewtonFirst, NewtonKrylov, NoPreconditioning

LENGTHS = np.logspace(-3, -1.5, 8)


def convolution() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).to(F64)
    images = normal(30, 1, 4, 4)
    return net, lambda net: F.cross_entropy(net(images), LABELS)


def equation() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """u' = u on a line, the derivative by autograd inside the loss."""
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).to(F64)

    def loss(net: nn.Module) -> Tensor:
        x = torch.linspace(0, 1, 9, dtype=F64)[:, None].requires_grad_()
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return F.mse_loss(slope, u) + (net(torch.zeros(1, 1, dtype=F64)) - 1).square().sum()

    return net, loss


class Valley(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([-1.2, 1.0, 0.5, 2.0], dtype=F64))


CASES = {
    "classifier": lambda: (network(), lambda net: F.cross_entropy(net(X), LABELS)),
    "regression": lambda: (network(), lambda net: F.mse_loss(net(X), 3 * normal(30, 3, seed=5))),
    "convolution": convolution,
    "equation": equation,
    "rosenbrock": lambda: (Valley(), lambda net: rosenbrock(net.x)),
}


def order(name: str, curvature: CurvatureChoice, lengths: np.ndarray) -> float:
    """The slope of log |E(t)| over log t, with E(t) as the record of a step of length t reports it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss = CASES[name]()
    start, errors = [p.detach().clone() for p in model.parameters()], []
    for t in lengths:
        with torch.no_grad():
            for p, saved in zip(model.parameters(), start, strict=True):
                p.copy_(saved)
        optimizer = NewtonKrylov(
            model.parameters(), curvature=curvature, step=FixedStep(float(t)), damping=NoDamping(),
            preconditioning=NoPreconditioning(),
        )
        optimizer.step(lambda: loss(model))
        errors.append(abs(optimizer.last_step.taylor_error))
    return float(np.polyfit(np.log(lengths), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", CASES)
def test_with_the_hessian_it_is_of_third_order(name):
    assert order(name, ExactHessian(), LENGTHS) == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("name", ["classifier", "regression", "convolution"])
def test_with_gauss_newton_it_is_of_second_order(name):
    assert order(name, GaussNewtonFirst(close=0), LENGTHS / 30) == pytest.approx(2.0, abs=0.15)
