"""What is for mini-batches: curvature of a part, short solves, the named configuration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep.globalization import FixedStep, NoDamping
from imstep.optim import (
    BlendedConjugateGradient,
    ConjugateGradient,
    ExactHessian,
    FixedProducts,
    NewtonKrylov,
    NoPreconditioning,
    ResidualForcing,
    StepOutcome,
)
from imstep.tasks import get_task

NEWTON = {
    "curvature": ExactHessian(),
    "preconditioning": NoPreconditioning(),
    "forcing": ResidualForcing(eta=1e-12),
    "damping": NoDamping(),
}


def quadratic(w: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return w @ matrix @ w / 2 - b @ w


# --- curvature of a part ------------------------------------------------------------------------------------------


def test_the_curvature_is_of_the_part_and_the_gradient_of_the_batch() -> None:
    w, b = nn.Parameter(normal(4)), normal(4, seed=1)
    of_batch, of_part = (torch.diag(torch.rand(4, dtype=F64) + 1) for _ in range(2))
    expected = w.detach() - torch.linalg.solve(of_part, of_batch @ w.detach() - b)
    optimizer = NewtonKrylov([w], step=FixedStep(1.0), **NEWTON)
    optimizer.step(lambda: quadratic(w, of_batch, b), lambda: quadratic(w, of_part, 0 * b))
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-9)
    cost = optimizer.last_step.cost
    assert (cost.gradients, cost.linearisations, cost.losses) == (1, 1, 2)  # one to see that it is the same


def test_the_whole_batch_as_its_part_gives_the_same_steps() -> None:
    weights = []
    for separate in (False, True):
        model = network()
        closure = lambda model=model: F.cross_entropy(model(X), LABELS)
        optimizer = NewtonKrylov.for_batches(model.parameters())
        for _ in range(6):
            optimizer.step(closure, closure if separate else None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)


class Noisy(nn.Module):
    """Running statistics and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4, dtype=F64), nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(x), 0.3))


def test_the_part_leaves_no_trace_in_buffers_and_random_numbers() -> None:
    torch.manual_seed(0)
    model = Noisy()
    before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    closure = lambda: F.cross_entropy(model(X), LABELS)
    closure()
    expected = torch.get_rng_state(), model.norm.running_mean.clone()
    torch.set_rng_state(before[0])
    model.load_state_dict(before[1])
    optimizer = NewtonKrylov.for_batches(model.parameters())
    optimizer.step(closure, lambda: F.cross_entropy(model(X[:10]), LABELS[:10]))
    assert optimizer.last_step.outcome is StepOutcome.ACCEPTED
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert torch.equal(model.norm.running_mean, expected[1])


def test_a_failing_part_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = Noisy()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    def part() -> Tensor:
        model(X)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        NewtonKrylov(model.parameters()).step(lambda: F.cross_entropy(model(X), LABELS), part)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


# --- short solves on a blend --------------------------------------------------------------------------------------


def steps(count: int, **options: object) -> tuple[Tensor, NewtonKrylov]:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), **options)
    for _ in range(count):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


def test_fixed_products() -> None:
    assert steps(3, forcing=FixedProducts(3))[1].last_step.products == 3
    with pytest.raises(ValueError, match="count"):
        FixedProducts(0)


def test_a_blend_without_a_share_or_without_a_preconditioner_is_plain() -> None:
    for extra, weight in (({}, 0.0), ({"preconditioning": NoPreconditioning()}, 0.5)):
        plain = steps(3, solver=ConjugateGradient(), forcing=FixedProducts(2), **extra)[0]
        blended = steps(3, solver=BlendedConjugateGradient(weight), forcing=FixedProducts(2), **extra)[0]
        torch.testing.assert_close(blended, plain, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="weight"):
        BlendedConjugateGradient(1.0)


# --- the configuration for mini-batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 128, 512])
def test_learns_on_batches_without_a_setting(size: int) -> None:
    problem = get_task("digits-mlp").build(seed=size)
    optimizer = NewtonKrylov.for_batches(problem.parameters)
    start, highest = problem.evaluate(problem.train).loss, 0.0
    for epoch in range(1 + size // 128):
        for batch in problem.batches(epoch, size):
            highest = max(highest, float(optimizer.step(problem.closure(batch))))
    assert highest < 1.5 * start
    assert problem.evaluate(problem.train).loss < 0.5
    assert problem.evaluate(problem.heldout).metric > 0.85


def test_options_replace_those_of_the_configuration() -> None:
    model = network()
    optimizer = NewtonKrylov.for_batches(model.parameters(), forcing=FixedProducts(5))
    optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    assert optimizer.last_step.products == 5


def test_the_last_step_is_dropped_where_parameters_change() -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS)
    optimizer = NewtonKrylov(model.parameters(), momentum=True)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        for _ in range(2):
            optimizer.step(closure)
            assert optimizer.last_step.accepted
