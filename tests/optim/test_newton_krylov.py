"""NewtonKrylov one step at a time: what it records and charges."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal, rosenbrock
from torch import Tensor, nn

from imstep.globalization import FixedStep
from imstep.linalg import KrylovStatus
from imstep.optim import (
    Cost,
    ExactHessian,
    Kronecker,
    NewtonKrylov,
    NoPreconditioning,
    StepOutcome,
)

# --- the record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"curvature": ExactHessian()}, {"preconditioning": NoPreconditioning()}])
def test_the_record_is_consistent(options: dict[str, Any]) -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS)
    optimizer = NewtonKrylov(model.parameters(), **options)
    params = list(model.parameters())
    for step in range(12):
        before = torch.cat([p.detach().reshape(-1) for p in params])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), params)])
        loss = float(optimizer.step(closure))
        r = optimizer.last_step
        after = torch.cat([p.detach().reshape(-1) for p in params])
        assert r.step == step
        assert r.loss == pytest.approx(loss, rel=1e-15)
        assert r.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
        assert r.new_loss == pytest.approx(float(closure().detach()), rel=1e-15)
        assert float((after - before).norm()) == pytest.approx(r.step_length * r.direction_norm, rel=1e-9)
        assert r.slope * r.step_length == pytest.approx(float(gradient @ (after - before)), rel=1e-7)
        assert r.slope < 0
        t = r.step_length
        assert r.predicted_decrease == pytest.approx(-t * r.slope - t * t * r.curvature / 2, rel=1e-10)
        assert r.actual_decrease == pytest.approx(r.loss - r.new_loss, rel=1e-9, abs=1e-15)
        if r.predicted_decrease > 0:  # else the step went on beyond twice the model's minimiser
            assert r.rho == pytest.approx(r.actual_decrease / r.predicted_decrease, rel=1e-9)
        assert r.taylor_error == pytest.approx(r.predicted_decrease - r.actual_decrease, rel=1e-9, abs=1e-15)
        assert r.products == r.cost.products >= r.iterations
        assert r.trials + (step == 0) >= r.cost.losses >= 1
        assert r.accepted
        assert r.seconds > 0


def test_curvature_is_that_of_the_direction() -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS)
    params = list(model.parameters())
    optimizer = NewtonKrylov(params, curvature=ExactHessian())
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        gradients = torch.autograd.grad(closure(), params, create_graph=True)
        optimizer.step(closure)
        r = optimizer.last_step
        moves = [(p.detach() - b) / r.step_length for p, b in zip(params, before, strict=True)]
        with torch.no_grad():
            for p, b in zip(params, before, strict=True):
                p.copy_(b)
        gradients = torch.autograd.grad(closure(), params, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, moves, strict=True))
        products = torch.autograd.grad(slope, params)
        curvature = float(sum((q * d).sum() for q, d in zip(products, moves, strict=True)))
        assert r.curvature == pytest.approx(curvature, rel=1e-6)
        with torch.no_grad():
            for p, b, d in zip(params, before, moves, strict=True):
                p.copy_(b + r.step_length * d)


def test_record_for_files() -> None:
    w = nn.Parameter(normal(4))
    optimizer = NewtonKrylov([w])
    for f in (rosenbrock, lambda w: rosenbrock(w) * math.nan, lambda w: 0 * (w**2).sum()):
        optimizer.step(lambda f=f: f(w))
        row = json.loads(json.dumps(optimizer.last_step.to_dict()))
        assert row["outcome"] == optimizer.last_step.outcome.name.lower()
        assert row["status"] is None or row["status"] in {s.name.lower() for s in KrylovStatus}
        assert row["gradient_equivalents"] == optimizer.last_step.cost.gradient_equivalents
        assert row["products"] == optimizer.last_step.products
        assert all(isinstance(v, (int, float, str, list, type(None))) for v in row.values())


def test_no_record_before_the_first_step() -> None:
    optimizer = NewtonKrylov([nn.Parameter(torch.ones(1))])
    assert optimizer.last_step is None
    assert optimizer.cost == Cost()


# --- the cost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"curvature": ExactHessian()}, {"step": FixedStep(0.5)}, {"preconditioning": Kronecker(every=1)}],
)
def test_every_evaluation_is_charged(options: dict[str, Any]) -> None:
    model = network()
    calls, backwards = 0, 0
    model[0].weight.register_hook(lambda g: _count())

    def _count() -> None:
        nonlocal backwards
        backwards += 1

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(X), LABELS)

    optimizer = NewtonKrylov(model.parameters(), **options)
    total = Cost()
    for _ in range(40):
        calls = backwards = 0
        optimizer.step(closure)
        cost = optimizer.last_step.cost
        assert calls == cost.linearisations + cost.gradients + cost.losses
        assert backwards == cost.linearisations + cost.gradients
        assert cost.linearisations == 1
        total += cost
    assert optimizer.cost == total


def test_products_of_both_kinds_are_told_apart() -> None:
    for options, kind in (({}, "gauss_newton_products"), ({"curvature": ExactHessian()}, "hessian_products")):
        model = network()
        optimizer = NewtonKrylov(model.parameters(), **options)
        optimizer.step(lambda model=model: F.cross_entropy(model(X), LABELS))
        cost = optimizer.last_step.cost
        assert getattr(cost, kind) == cost.products > 0


def test_gradient_equivalents() -> None:
    cost = Cost(gradients=1, linearisations=3, hessian_products=5, gauss_newton_products=6, losses=9, refreshes=3)
    assert cost.gradient_equivalents == pytest.approx(1 + 4 + 10 + 8 + 3 + 2)
    assert (cost + cost).products == 22


# --- losses near rounding -----------------------------------------------------------------------------------------


def test_rounding_level_is_judged_by_gradients() -> None:
    """A large constant hides the decrease of the loss, not its slope."""
    w = nn.Parameter(normal(6))
    scale = torch.logspace(0, 2, 6, dtype=F64)
    optimizer = NewtonKrylov([w])
    for _ in range(12):
        optimizer.step(lambda: 1e10 + (scale * (w - 1).cosh()).sum())
        assert optimizer.last_step.outcome in (StepOutcome.ACCEPTED, StepOutcome.CONVERGED)
    assert optimizer.cost.gradients > 0
    torch.testing.assert_close(w.detach(), torch.ones(6, dtype=F64), rtol=0, atol=1e-9)


def test_single_precision_at_the_end() -> None:
    """Steps may be rejected there, but nothing is lost and nothing raised."""
    model = network().float()
    x = X.float()
    closure = lambda: F.cross_entropy(model(x), LABELS) + 1e-3 * sum((p**2).sum() for p in model.parameters())
    optimizer = NewtonKrylov(model.parameters())
    losses = [float(optimizer.step(closure)) for _ in range(80)]
    assert optimizer.last_step.gradient_norm < 1e-4
    assert losses[-1] <= min(losses) * (1 + 1e-5)


def test_wide_layers_get_a_diagonal_instead_of_factors() -> None:
    model = network()  # 4-6-3
    optimizer = NewtonKrylov(model.parameters(), preconditioning=Kronecker(largest=5))
    first = float(optimizer.step(lambda: F.cross_entropy(model(X), LABELS)))
    factors = optimizer.state_dict()["newton_krylov"]["preconditioner"]["factors"]
    assert factors["blocks"] == []  # both layers touch the width 6
    assert F.cross_entropy(model(X), LABELS).item() < first
