"""How fast the optimizer ends, on real data: superlinear, by full steps, at a minimum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from optim_cases import F64, fitted_order
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from imstep.optim import NewtonKrylov, StepRecord

Closure = Callable[[], Tensor]


def standardised(load: Callable[..., tuple[np.ndarray, np.ndarray]], examples: int) -> tuple[Tensor, Tensor]:
    x, y = map(torch.as_tensor, load(return_X_y=True))
    x = x[:examples].to(F64)
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-3), y[:examples]


def penalised(model: nn.Module, loss: Closure, weight: float) -> Closure:
    return lambda: loss() + weight * sum((p**2).sum() for p in model.parameters())


def cancer(weight: float, hidden: int = 0) -> tuple[nn.Module, Closure]:
    """569 cases, 30 features, 2 classes."""
    x, y = standardised(load_breast_cancer, 569)
    layers = [nn.Linear(30, hidden), nn.Tanh(), nn.Linear(hidden, 1)] if hidden else [nn.Linear(30, 1)]
    model = nn.Sequential(*layers).to(F64)
    return model, penalised(model, lambda: F.binary_cross_entropy_with_logits(model(x)[:, 0], y.double()), weight)


def digits(weight: float, hidden: int = 0) -> tuple[nn.Module, Closure]:
    """300 pictures, 64 pixels, 10 classes."""
    x, y = standardised(load_digits, 300)
    layers = [nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)] if hidden else [nn.Linear(64, 10)]
    model = nn.Sequential(*layers).to(F64)
    return model, penalised(model, lambda: F.cross_entropy(model(x), y), weight)


CONVEX = {
    "cancer": lambda: cancer(1e-3),
    "cancer, ill-conditioned": lambda: cancer(1e-4),
    "digits": lambda: digits(1e-3),
}
NETWORKS = {
    "cancer": lambda: cancer(1e-2, hidden=6),
    "cancer, ill-conditioned": lambda: cancer(1e-3, hidden=6),
    "digits": lambda: digits(1e-2, hidden=8),
}


def run(make: Callable[[], tuple[nn.Module, Closure]], steps: int) -> tuple[nn.Module, Closure, list[StepRecord]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, closure = make()
    optimizer, records = NewtonKrylov(model.parameters()), []
    while len(records) < steps and (not records or records[-1].gradient_norm > 1e-12):
        optimizer.step(closure)
        records.append(optimizer.last_step)
    return model, closure, records


def assert_superlinear(records: list[StepRecord]) -> None:
    assert fitted_order([r.gradient_norm for r in records]) >= 1.4
    ending = [r for r in records if r.accepted][-3:]
    assert all(r.step_length == pytest.approx(1, abs=0.1) for r in ending)
    assert ending[-1].step_length == pytest.approx(1, abs=1e-3)
    assert records[-1].gradient_norm < 1e-12


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", CONVEX)
def test_logistic_regression(name: str) -> None:
    model, closure, records = run(CONVEX[name], steps=40)
    assert_superlinear(records)
    found, parameters = float(closure().detach()), list(model.parameters())

    def scipy_form(w: np.ndarray) -> tuple[float, np.ndarray]:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(w.copy()), parameters)
        loss = closure()
        return float(loss.detach()), flat(torch.autograd.grad(loss, parameters)).numpy()

    start, options = 0 * flat(parameters).numpy(), {"gtol": 1e-8, "ftol": 0.0, "maxiter": 2000}
    best = scipy.optimize.minimize(scipy_form, start, jac=True, method="L-BFGS-B", options=options)
    assert found == pytest.approx(best.fun, rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_near_a_minimum(name: str) -> None:
    model, closure, records = run(NETWORKS[name], steps=150)
    assert_superlinear(records)
    parameters = list(model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), parameters, create_graph=True)])
    identity = torch.eye(len(gradient), dtype=F64)
    rows = torch.autograd.grad(gradient, parameters, identity, is_grads_batched=True)
    hessian = torch.cat([row.reshape(len(gradient), -1) for row in rows], 1)
    assert torch.linalg.eigvalsh(hessian).min() > 0
