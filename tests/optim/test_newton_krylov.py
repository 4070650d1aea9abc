"""NewtonKrylov one step at a time: what it records, charges, refuses and restores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.globalization import FixedStep, LevenbergMarquardt, NoDamping, TaylorMonitor
from imstep.linalg import KrylovStatus
from imstep.optim import (
    BestRateForcing,
    Cost,
    ExactHessian,
    Kronecker,
    NewtonKrylov,
    NonFiniteLossError,
    NoPreconditioning,
    ResidualForcing,
    StepOutcome,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, LABELS = normal(30, 4), torch.arange(30) % 3


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)


def rosenbrock(w: Tensor) -> Tensor:
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


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
        assert r.rho == pytest.approx(r.actual_decrease / r.predicted_decrease, rel=1e-9)
        assert r.taylor_error == pytest.approx(r.predicted_decrease - r.actual_decrease, rel=1e-9, abs=1e-15)
        assert r.products == r.cost.products >= r.iterations
        assert r.trials >= r.cost.losses >= 1
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
        assert all(isinstance(v, (int, float, str, type(None))) for v in row.values())


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


# --- refusals -----------------------------------------------------------------------------------------------------


def test_several_refusals_raise() -> None:
    w = nn.Parameter(normal(3))
    before = w.detach().clone()
    optimizer = NewtonKrylov([w], max_refusals=3)
    for _ in range(2):
        optimizer.step(lambda: (w * math.nan).sum())
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row .* empty batch"):
        optimizer.step(lambda: (w * math.nan).sum())
    assert torch.equal(w, before)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    optimizer.step(lambda: (w**2).sum())
    assert optimizer.last_step.accepted


def test_refusals_are_counted_in_a_row() -> None:
    w = nn.Parameter(normal(3))
    optimizer = NewtonKrylov([w], max_refusals=2)
    for _ in range(4):
        optimizer.step(lambda: (w * math.nan).sum())
        optimizer.step(lambda: (w**2).cosh().sum())


def test_gradient_that_is_not_finite() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = NewtonKrylov([w])
    assert float(optimizer.step(lambda: w.abs().sqrt().sum())) == 0
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert not w.any()


def test_empty_batch() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NewtonKrylov(model.parameters())
    loss = optimizer.step(lambda: F.cross_entropy(model(X[:0]), LABELS[:0]))
    assert math.isnan(loss)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_function_that_falls_to_minus_infinity_is_not_followed() -> None:
    """From the exact saddle at zero: log is -inf where the escape first lands, and nothing is accepted there."""
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    loss = lambda: (1 - (w**2).sum()).clamp(min=0).log()
    optimizer = NewtonKrylov([w])
    optimizer.step(loss)
    assert math.isfinite(optimizer.last_step.new_loss)
    assert bool(w.isfinite().all())


def test_products_that_are_not_finite_do_not_end_the_run() -> None:
    """|w|^1.5 has a gradient at zero, but no second derivative."""
    w = nn.Parameter(torch.tensor([0.0, 0.0], dtype=F64))
    optimizer = NewtonKrylov([w])
    loss = lambda: (w.abs() ** 1.5).sum() + ((w - 1) ** 2).sum()
    start = float(optimizer.step(loss))
    assert float(loss().detach()) < start


# --- misuse -------------------------------------------------------------------------------------------------------


def step_with(result: Callable[[Tensor], Any]) -> tuple[nn.Parameter, NewtonKrylov]:
    w = nn.Parameter(normal(3))
    before, optimizer = w.detach().clone(), NewtonKrylov([w])
    with pytest.raises(ValueError, match=r"closure returned|depends on none"):
        optimizer.step(lambda: result(w))
    assert torch.equal(w, before)
    assert w.grad is None
    assert optimizer.last_step is None
    assert optimizer.cost == Cost()
    return w, optimizer


@pytest.mark.parametrize(
    "result",
    [
        lambda w: w,
        lambda w: None,
        lambda w: float(w.detach().sum()),
        lambda w: (w**2).sum().detach(),
        lambda w: (w * 1j).sum(),
        lambda w: normal(2).requires_grad_().sum(),
    ],
)
def test_closures_that_return_no_usable_loss(result: Callable[[Tensor], Any]) -> None:
    w, optimizer = step_with(result)
    optimizer.step(lambda: (w**2).sum())
    assert optimizer.last_step.accepted


def test_no_closure() -> None:
    with pytest.raises(TypeError, match="needs a closure"):
        NewtonKrylov([nn.Parameter(torch.ones(1))]).step()


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        ([nn.Parameter(torch.ones(2), requires_grad=False)], ValueError, "requires_grad=False"),
        ([nn.Parameter(torch.ones(2, dtype=torch.complex128))], TypeError, "complex128"),
        ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))], ValueError, "several devices"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ],
)
def test_parameters_that_cannot_be_optimised(params: list[Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NewtonKrylov(params)


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": -1.0},
        {"tolerance": math.nan},
        {"curvature_floor": -1e-3},
        {"max_trials": 0},
        {"max_refusals": 0},
    ],
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        NewtonKrylov([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kronecker(every=0),
        lambda: Kronecker(decay=1.0),
        lambda: BestRateForcing(eta=0.0),
        lambda: BestRateForcing(max_products=0),
        lambda: ResidualForcing(eta=1.0),
        lambda: ResidualForcing(max_products=0),
        lambda: TaylorMonitor(theta=2.0),
        lambda: LevenbergMarquardt(factor=0.5),
    ],
)
def test_strategies_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"got"):
        make()


# --- parameters that come and go ----------------------------------------------------------------------------------


def test_groups_can_be_added() -> None:
    a, b = nn.Parameter(normal(2)), nn.Parameter(normal(3, seed=1))
    optimizer = NewtonKrylov([a])
    loss = lambda: ((a - 1) ** 4).sum() + ((b - 2) ** 2).sum()
    optimizer.step(loss)
    before = b.detach().clone()
    assert torch.equal(b, before)
    optimizer.add_param_group({"params": [b]})
    for _ in range(30):
        optimizer.step(loss)
    torch.testing.assert_close(b.detach(), torch.full((3,), 2.0, dtype=F64), rtol=0, atol=1e-6)


def test_parameters_can_be_frozen_and_thawed() -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS)
    optimizer = NewtonKrylov(model.parameters())
    optimizer.step(closure)
    model[0].requires_grad_(False)
    kept = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, kept)
    model[0].requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, kept)


def test_all_frozen_later() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = NewtonKrylov([w])
    w.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        optimizer.step(lambda: (w**2).sum())


# --- saved states -------------------------------------------------------------------------------------------------


def saved() -> tuple[NewtonKrylov, dict[str, Any]]:
    model = network()
    optimizer = NewtonKrylov(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    return optimizer, optimizer.state_dict()


def without(state: dict[str, Any], *path: str) -> dict[str, Any]:
    copied = {**state, "newton_krylov": dict(state["newton_krylov"])}
    del copied["newton_krylov"][path[0]]
    return copied


@pytest.mark.parametrize("entry", ["memory", "cost", "preconditioner", "shapes"])
def test_damaged_states_are_refused(entry: str) -> None:
    optimizer, state = saved()
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"this state"):
        optimizer.load_state_dict(without(state, entry))
    assert repr(optimizer.state_dict()) == before


def test_foreign_states_are_refused() -> None:
    optimizer, _ = saved()
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match="not saved by NewtonKrylov"):
        optimizer.load_state_dict(torch.optim.Adam(network().parameters()).state_dict())
    other = NewtonKrylov(nn.Linear(4, 6).to(F64).parameters())
    with pytest.raises(ValueError, match=r"shapes \[\[6, 4\], \[6\]\]"):
        optimizer.load_state_dict(other.state_dict())
    plain = NewtonKrylov(network().parameters(), preconditioning=NoPreconditioning())
    with pytest.raises(ValueError, match="another preconditioning"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="another preconditioning"):
        plain.load_state_dict(optimizer.state_dict())
    assert repr(optimizer.state_dict()) == before


def test_damping_is_remembered() -> None:
    w = nn.Parameter(2 * normal(5))
    optimizer = NewtonKrylov([w], damping=LevenbergMarquardt(initial=0.5))
    for _ in range(5):
        optimizer.step(lambda: rosenbrock(w))
    state = optimizer.state_dict()["newton_krylov"]["memory"]
    assert state["damping"] != 0.5
    assert state["steps"] == 5


def test_no_damping_is_none() -> None:
    w = nn.Parameter(2 * normal(5))
    optimizer = NewtonKrylov([w], damping=NoDamping())
    for _ in range(5):
        optimizer.step(lambda: rosenbrock(w))
        assert optimizer.last_step.damping == 0
