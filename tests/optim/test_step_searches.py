"""Step searches within the optimizer: where they arrive, and what they are charged for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, rosenbrock
from torch import Tensor, nn

import imstep
from imstep.curvature import FrozenClosure
from imstep.globalization import (
    Armijo,
    Damping,
    ExactEstimate,
    LevenbergMarquardt,
    NoDamping,
    StepSearch,
    StrongWolfe,
    TaylorMonitor,
    TrustRegion,
)
from imstep.optim import (
    ConjugateGradient,
    Direct,
    ExactHessian,
    MinimalResidual,
    NewtonKrylov,
    Solver,
    SteihaugToint,
    StepOutcome,
)

SEARCHES: dict[str, dict[str, Any]] = {
    "monitor": {"step": TaylorMonitor()},
    "exact": {"step": TaylorMonitor(error=ExactEstimate())},
    "armijo": {"step": Armijo()},
    "strong wolfe": {"step": StrongWolfe()},
    "trust region": {"step": TrustRegion(), "solver": SteihaugToint(), "damping": NoDamping()},
    "trust region along conjugate gradients": {"step": TrustRegion()},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_rosenbrock_and_a_network_are_solved(name: str) -> None:
    start = torch.tensor([-1.2, 1.0] * 5, dtype=F64)
    result = imstep.minimize(rosenbrock, start, maxiter=300, **SEARCHES[name])
    assert result.success
    torch.testing.assert_close(result.x, torch.ones(10, dtype=F64), rtol=0, atol=1e-7)
    losses = [record.loss for record in result.records]
    assert all(after <= before for before, after in pairwise(losses))

    model = network()
    decay = lambda: 1e-2 * sum((p**2).sum() for p in model.parameters())
    optimizer = NewtonKrylov(model.parameters(), tolerance=1e-6, **SEARCHES[name])
    for _ in range(80):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS) + decay())
        if optimizer.last_step.outcome is StepOutcome.CONVERGED:
            break
    assert optimizer.last_step.outcome is StepOutcome.CONVERGED


class Counting(FrozenClosure):
    """Counts evaluations by kind."""

    counts: dict[str, int]

    def gradient(self) -> tuple[Tensor, Tensor]:
        self.counts["gradients"] += 1
        return super().gradient()

    def loss(self) -> Tensor:
        self.counts["losses"] += 1
        return super().loss()

    def product(self, direction: Tensor, h: float | None = None) -> Tensor:
        self.counts["third_derivatives"] += 1  # no other product has an evaluation of its own
        return super().product(direction, h)


@pytest.mark.parametrize("name", ["monitor", "exact", "strong wolfe"])
def test_each_evaluation_of_a_step_is_charged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.counts = {"gradients": 0, "losses": 0, "third_derivatives": 0}
    monkeypatch.setattr("imstep.optim.stepwise.FrozenClosure", Counting)
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=F64))
    optimizer = NewtonKrylov([w], **SEARCHES[name])
    trials = 0
    for _ in range(8):
        optimizer.step(lambda: rosenbrock(w))
        trials += optimizer.last_step.trials
    cost = optimizer.cost
    losses = cost.losses - 1  # the first step looks twice at its start
    assert Counting.counts == {k: getattr(cost, k) for k in Counting.counts} | {"losses": losses}
    assert trials == (cost.gradients if name == "strong wolfe" else losses) >= 8
    assert cost.third_derivatives == (8 if name == "exact" else 0)
    dearer = replace(cost, third_derivatives=cost.third_derivatives + 1)
    assert dearer.gradient_equivalents == pytest.approx(cost.gradient_equivalents + 25 / 3)


def test_steps_satisfy_the_wolfe_conditions() -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0, -0.5, 2.0], dtype=F64))
    optimizer = NewtonKrylov([w], step=StrongWolfe(c2=0.3), curvature=ExactHessian())
    for _ in range(10):
        before = w.detach().clone()
        optimizer.step(lambda: rosenbrock(w))
        step, slope = optimizer.last_step, optimizer.last_step.slope
        after = w.detach().clone().requires_grad_()
        loss = rosenbrock(after)
        (gradient,) = torch.autograd.grad(loss, after)
        along = float(gradient @ (after.detach() - before)) / step.step_length
        assert step.accepted
        assert float(loss.detach()) <= step.loss + 1e-4 * step.step_length * slope
        assert abs(along) <= 0.3 * abs(slope) * (1 + 1e-9)


@pytest.mark.parametrize("damping", [NoDamping(), LevenbergMarquardt(ceiling=1e-3)])
@pytest.mark.parametrize("step", [Armijo(), StrongWolfe(), TaylorMonitor(), TrustRegion()])
@pytest.mark.parametrize("solver", [ConjugateGradient(), MinimalResidual(), SteihaugToint(), Direct()])
def test_no_combination_repeats_a_rejected_step(solver: Solver, step: StepSearch, damping: Damping) -> None:
    """The exact solution of a nearly singular system is too long by more than twelve trials can make good."""
    start = torch.tensor([-0.796381, 0.639213], dtype=F64)
    options = {"curvature": ExactHessian(), "solver": solver, "step": step, "damping": damping, "max_trials": 12}
    result = imstep.minimize(rosenbrock, start, maxiter=200, **options)
    steps = [(r.accepted, r.direction_norm, r.step_length) for r in result.records]
    assert not any(not a[0] and a == b for a, b in pairwise(steps))
    assert result.success
    torch.testing.assert_close(result.x, torch.ones(2, dtype=F64), rtol=0, atol=1e-6)


def test_a_rejected_step_is_followed_by_a_damped_one() -> None:
    """Whatever the strategies, λ grows while steps are rejected, and goes again afterwards."""
    w = nn.Parameter(torch.tensor([-0.796381, 0.639213], dtype=F64))
    options = {"curvature": ExactHessian(), "solver": Direct(), "step": Armijo(), "damping": NoDamping()}
    optimizer = NewtonKrylov([w], max_trials=1, **options)
    records = []
    for _ in range(60):
        optimizer.step(lambda: rosenbrock(w))
        records.append(optimizer.last_step)
    assert any(not a.accepted and b.damping > a.damping for a, b in pairwise(records))
    assert all(b.damping > a.damping for a, b in pairwise(records) if not a.accepted and a.gradient_norm > 1e-6)
    assert records[-1].loss < 1e-12
