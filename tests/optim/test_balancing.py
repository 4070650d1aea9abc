"""Weights of a loss's terms, found by least squares itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import Tensor, nn

from imstep import pde
from imstep.globalization import ContractionDamping
from imstep.optim import (
    Balancing,
    Box,
    ColumnNorms,
    EarlierDraws,
    EqualGradients,
    EqualTraces,
    LeastSquares,
    MicroBatches,
    StepOutcome,
)

FACTORS = 1.0, 30.0
DENSE = {"share": 0.0, "corrections": 1, "damping": ContractionDamping(initial=1.0)}


def network(dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def fit(model: nn.Module, step: int = 0, factors: tuple[float, float] = FACTORS) -> Callable[[], Tensor]:
    """u_x + u_y = x y inside, u = 0 at x = 0, in the form of the gradient at 9 and 4 points."""
    dtype = next(model.parameters()).dtype
    inside, edge = normal(9, 2, seed=step).to(dtype), normal(4, 2, seed=100 + step).to(dtype)
    edge[:, 0] = 0

    def loss() -> Tensor:
        equation = pde.gradient(model, inside).sum(-1) - inside.prod(1, keepdim=True)
        return factors[0] * equation.square().mean() + factors[1] * F.mse_loss(model(edge), 0 * edge[:, :1])

    return loss


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def terms(model: nn.Module, step: int) -> list[tuple[Tensor, Tensor]]:
    """ρ and J of each term by autograd, row by row, with f = Σ ρᵀρ/2."""
    inside, edge = normal(9, 2, seed=step), normal(4, 2, seed=100 + step)
    edge[:, 0] = 0
    inside.requires_grad_()
    (slopes,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
    found = []
    for factor, z in zip(FACTORS, (slopes.sum(1) - inside.prod(1), model(edge)[:, 0]), strict=True):
        rho = math.sqrt(2 * factor / len(z)) * z
        rows = [torch.autograd.grad(r, list(model.parameters()), retain_graph=True, allow_unused=True) for r in rho]
        pairs = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, model.parameters())] for row in rows]  # noqa: B905
        found.append((rho.detach(), torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in pairs])))
    return found


def by_traces(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([J.square().sum() for _, J in parts])


def by_gradients(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(J.T @ rho).norm() for rho, J in parts])


@pytest.mark.parametrize(("rule", "sizes"), [(EqualTraces, by_traces), (EqualGradients, by_gradients)])
def test_steps_are_those_of_dense_algebra(rule: type[Balancing], sizes: Callable[..., Tensor]) -> None:
    model = network()
    optimizer = LeastSquares(model.parameters(), balance=rule(memory=0.5), **DENSE)  # type: ignore[arg-type]
    last = None
    for step in range(5):
        w, parts = flat(model), terms(model, step)
        s = sizes(parts)
        now = s.mean() / (s + 1e-5 * s.mean())
        last = now if last is None else (last + now) / 2
        start = float(optimizer.step(fit(model, step)))
        record = optimizer.last_step
        assert record.weights == pytest.approx(last.tolist(), rel=1e-9)
        rho = torch.cat([c.sqrt() * r for c, (r, _) in zip(last, parts, strict=True)])
        J = torch.cat([c.sqrt() * rows for c, (_, rows) in zip(last, parts, strict=True)])
        d = -torch.linalg.solve(J.T @ J + record.damping * torch.eye(len(w), dtype=F64), J.T @ rho)
        torch.testing.assert_close(flat(model) - w, d, rtol=1e-6, atol=1e-9)
        assert record.loss == start
        assert record.new_loss == pytest.approx(float(fit(model, step)().detach()))
        after = sum(c * r.square().sum() / 2 for c, (r, _) in zip(last, terms(model, step), strict=True))
        assert record.weighted_loss == pytest.approx(float(rho.square().sum() / 2))
        assert record.new_weighted_loss == pytest.approx(float(after))
        assert record.actual_decrease == pytest.approx(record.weighted_loss - record.new_weighted_loss)
        assert record.slope == pytest.approx(float((J.T @ rho) @ d))
        plain = sum((rows.T @ r for r, rows in parts), torch.zeros_like(w))
        torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), plain)
        assert record.gradient_norm == pytest.approx(float(plain.norm()))


@pytest.mark.parametrize("rule", [EqualTraces(), EqualGradients()], ids=str)
def test_factors_of_the_closure_do_not_count(rule: Balancing) -> None:
    model, shares = network(), []
    for factors in ((1.0, 30.0), (1.0, 1e-2)):
        twin = copy.deepcopy(model)
        optimizer = LeastSquares(twin.parameters(), balance=rule)
        optimizer.step(fit(twin, 0, factors))
        weights = optimizer.last_step.weights
        shares.append(factors[1] * weights[1] / (factors[0] * weights[0]))
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)


OTHERS: dict[str, dict[str, Any]] = {
    "momentum, rate": {"momentum": 0.3, "lr": 0.5},
    "recall": {"recall": EarlierDraws()},
    "decay, bound": {"weight_decay": 1e-3, "max_step_norm": 0.1},
    "scaled": {"scaling": ColumnNorms()},
    "box": {"box": Box(torch.full((33,), -0.9, dtype=F64), torch.full((33,), 0.9, dtype=F64))},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_options_and_resumes(options: dict[str, Any]) -> None:
    model = network()
    twin = copy.deepcopy(model)
    make = partial(LeastSquares, balance=EqualTraces(), **options)
    first, second = make(model.parameters()), make(twin.parameters())
    for step in range(4):
        first.step(fit(model, step))
        if step == 2:
            state = copy.deepcopy(second.state_dict())
            second = make(twin.parameters())
            second.load_state_dict(state)
        second.step(fit(twin, step))
        record = first.last_step
        assert record.new_loss - record.new_penalty == pytest.approx(float(fit(model, step)().detach()))
        assert record.new_weighted_loss <= record.weighted_loss
    assert torch.equal(flat(model), flat(twin))


def test_single_precision_down_to_its_rounding() -> None:
    model = network(torch.float32)
    optimizer = LeastSquares(model.parameters(), balance=EqualGradients())
    losses = [float(optimizer.step(fit(model))) for _ in range(20)]
    assert losses[-1] < 1e-6 * losses[0]
    assert all(math.isfinite(value) for value in optimizer.last_step.weights)


def test_at_the_least_weighted_loss_it_has_converged() -> None:
    """Two conditions that cannot both hold: weights move the minimum, the loss without them has a gradient there."""
    w = nn.Parameter(torch.tensor([5.0], dtype=F64))
    optimizer = LeastSquares([w], balance=EqualTraces(memory=0.0), tolerance=1e-9)
    for _ in range(40):
        optimizer.step(lambda: (10 * w - 10).square().sum() + (w + 1).square().sum())
        if optimizer.last_step.outcome is StepOutcome.CONVERGED:
            break
    assert optimizer.last_step.outcome is StepOutcome.CONVERGED
    assert float(w.detach()) == pytest.approx(0.0, abs=1e-3)
    assert optimizer.last_step.gradient_norm > 1


def test_a_term_that_follows_no_parameter_has_no_weight() -> None:
    model = network()
    constant = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = LeastSquares(model.parameters(), balance=EqualTraces())
    optimizer.step(lambda: fit(model)() + constant.square().sum())
    assert optimizer.last_step.accepted
    assert len(optimizer.last_step.weights) == 2


def test_nothing_to_balance_is_refused() -> None:
    model = network()
    before = flat(model)
    optimizer = LeastSquares(model.parameters(), balance=EqualTraces())
    with pytest.raises(ValueError, match="the loss has one term"):
        optimizer.step(lambda: model(normal(5, 2)).square().mean())
    with pytest.raises(ValueError, match="a batch in pieces"):
        optimizer.step(MicroBatches(lambda x: model(x).square().mean(), normal(4, 2).split(2)))  # type: ignore[arg-type]
    assert torch.equal(flat(model), before)
    with pytest.raises(TypeError, match="balance must be EqualTraces"):
        LeastSquares(model.parameters(), balance="ntk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory"):
        EqualTraces(memory=1.0)
