"""Steps that end where the loss is finite and its gradient is not: the next one takes them back, and goes less far."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import F64, normal
from torch import Tensor, nn

import imstep
from benchmarks.nist.problems import REGRESSIONS
from imstep.globalization import (
    Armijo,
    Damping,
    FixedStep,
    NoDamping,
    StepSearch,
    StrongWolfe,
    TaylorMonitor,
    TrustRegion,
)
from imstep.optim import ExactHessian, LeastSquares, NewtonKrylov, StepOutcome

SEARCHES = [Armijo(), Armijo(forward=2.0), TaylorMonitor(), StrongWolfe(), TrustRegion(), FixedStep()]


def root(x: Tensor) -> Tensor:
    """(√x - 0.1)², 0.01 for x < 0, where its gradient is 0·∞; Newton's steps from above end there."""
    return (torch.where(x > 0, x.sqrt(), 0.0) - 0.1).square().sum()


def entropy(x: Tensor) -> Tensor:
    """Least at x = 1/e, and lower yet beyond 0, without a gradient."""
    return torch.where(x > 0, x * x.log(), -1 + x.sqrt().nan_to_num(0.0)).sum()


def start() -> nn.Parameter:
    return nn.Parameter(torch.tensor([5.0, 3.0], dtype=F64))


@pytest.mark.parametrize("damping", [None, NoDamping()], ids=["damped", "undamped"])
@pytest.mark.parametrize("step", SEARCHES, ids=lambda s: type(s).__name__)
def test_each_search_comes_back(step: StepSearch, damping: Damping | None) -> None:
    w = start()
    optimizer = NewtonKrylov([w], step=step, damping=damping, curvature=ExactHessian())
    for _ in range(60):
        optimizer.step(lambda: root(w))
        assert optimizer.last_step.outcome is not StepOutcome.NON_FINITE
        if optimizer.last_step.outcome is StepOutcome.CONVERGED:
            break
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.01, dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [NewtonKrylov.for_batches, LeastSquares])
def test_other_optimizers(make: Callable[..., Any]) -> None:
    w = start()
    optimizer = make([w])
    for _ in range(60):
        optimizer.step(lambda: root(w))
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.01, dtype=F64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_minimize(unit: float) -> None:
    for function, minimum in ((root, 0.01), (entropy, 0.36787944117144233)):
        result = imstep.minimize(lambda x, f=function: f(x / unit), unit * torch.tensor([5.0, 3.0], dtype=F64))
        assert result.success, function
        torch.testing.assert_close(result.x / unit, torch.full((2,), minimum, dtype=F64), rtol=1e-8, atol=0)
        assert any(record.went_back for record in result.records)


@pytest.mark.parametrize("at", [0, 1])
def test_rat43(at: int) -> None:
    (regression,) = (r for r in REGRESSIONS if r.name == "Rat43")
    result = imstep.minimize(regression, regression.starts[at])
    assert result.success
    assert regression.digits(result.x) > 7


def test_what_a_step_that_goes_back_tells() -> None:
    w = start()
    before = w.detach().clone()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    first = float(optimizer.step(lambda: root(w)))
    assert optimizer.last_step.accepted
    assert bool((w < 0).any())
    assert optimizer.last_step.cost.gradients == 0  # to look costs nothing
    length = optimizer.last_step.step_length * optimizer.last_step.direction_norm
    optimizer.step(lambda: root(w))
    record = optimizer.last_step
    assert record.went_back
    assert (record.loss, record.step) == (first, 1)
    assert record.step_length * record.direction_norm <= length / 4 * (1 + 1e-12)
    assert (record.cost.linearisations, record.cost.gradients) == (2, 1)
    torch.testing.assert_close(w.grad, torch.autograd.grad(root(p := before.requires_grad_()), p)[0])


def test_a_batch_without_a_gradient_moves_nothing() -> None:
    w = start()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    optimizer.step(lambda: (w - 1).square().sum())
    before, saved = w.detach().clone(), optimizer.state_dict()["newton_krylov"]["memory"]
    optimizer.step(lambda: (w - 1).square().sum() + (w * 0).sqrt().sum())
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert torch.equal(w, before)
    after = optimizer.state_dict()["newton_krylov"]["memory"]
    assert torch.equal(after["previous"], saved["previous"])


def test_parameters_that_someone_else_has_moved_stay() -> None:
    w = start()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    optimizer.step(lambda: (w - 2).square().sum())
    with torch.no_grad():
        w.copy_(torch.tensor([-1.0, 1.0]))
    optimizer.step(lambda: root(w))
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert w.tolist() == [-1, 1]


def test_on_another_batch() -> None:
    """Where the step has ended the new batch has no gradient; where it began it has."""
    w = start()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    optimizer.step(lambda: (w + 1).square().sum())
    assert bool((w < 0).all())
    optimizer.step(lambda: root(w))
    assert optimizer.last_step.went_back
    assert bool(torch.autograd.grad(root(w), w)[0].isfinite().all())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_run_resumes_bit_for_bit(steps: int) -> None:
    w, file = start(), io.BytesIO()
    optimizer = NewtonKrylov([w])
    for _ in range(steps):
        optimizer.step(lambda: root(w))
    torch.save({"w": w.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = nn.Parameter(saved["w"].clone())
    resumed = NewtonKrylov([other])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(12):
        optimizer.step(lambda: root(w))
        resumed.step(lambda: root(other))
        assert torch.equal(w, other)
    assert resumed.cost == optimizer.cost


def test_an_interrupt_on_the_way_back_loses_nothing() -> None:
    w = start()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    optimizer.step(lambda: root(w))
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())
    for at in (1, 2, 3, 4):
        calls = 0

        def closure(at: int = at) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return root(w)

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.equal(w, before)
        assert repr(optimizer.state_dict()) == repr(state)


def test_escapes_are_taken_back() -> None:
    """From the maximum of cos(5x) a long step leads to where the gradient ends."""
    w = nn.Parameter(torch.zeros(1, dtype=F64))
    edge = lambda: (5 * w).cos().sum() + torch.where(w.abs() < 1, (1 - w * w).sqrt(), -5.0).sum()
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    for _ in range(40):
        optimizer.step(edge)
    assert float(torch.autograd.grad(edge(), w)[0].abs()) < 1e-9
    assert abs(w.item()) < 1


def test_half_precision_is_known_again() -> None:
    w = nn.Parameter(torch.tensor([5.0, 3.0], dtype=torch.bfloat16))
    optimizer = NewtonKrylov([w], curvature=ExactHessian())
    for _ in range(20):
        optimizer.step(lambda: root(w.float()))
    assert root(w.float()).item() < 1e-4


def test_noise_in_the_data_is_no_reason() -> None:
    """A finite start is never left backwards, whatever its loss."""
    w = nn.Parameter(normal(3))
    optimizer = NewtonKrylov([w])
    for seed in range(6):
        optimizer.step(lambda seed=seed: (w - normal(3, seed=seed)).square().sum() * 10.0**seed)
        assert not optimizer.last_step.went_back
