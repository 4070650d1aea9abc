"""Costs are what an independent count of forward and backward passes says."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from imstep.runs.optimizers import OPTIMIZERS, OptimizerError, get_optimizer
from imstep.tasks import Batch, ExampleProblem, Problem

NAMES = list(OPTIMIZERS)
FIRST_ORDER = [name for name in NAMES if name in ("adam", "sgd", "lbfgs")]


class Counted(nn.Module):
    """Counts forward passes, and backward passes that reach its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forwards = self.backwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, gradient: torch.Tensor) -> None:
        self.backwards += 1


@pytest.fixture
def problem() -> Iterator[Problem]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        batch = Batch(torch.randn(30, 4).double(), torch.randn(30, 2).double())
        yield ExampleProblem("t", model, batch, batch, nn.MSELoss())


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_cost_is_the_number_of_gradients(name: str, problem: Problem) -> None:
    counted = Counted(problem.model)
    problem = ExampleProblem("t", counted, problem.train, problem.heldout, problem.loss)
    stepper = get_optimizer(name).create(problem)
    for _ in range(5):
        before = counted.forwards, counted.backwards
        result = stepper.step(problem, problem.train)
        passes = counted.forwards - before[0], counted.backwards - before[1]
        assert passes == (result.gradients, result.gradients)
        assert result.cost == result.gradients
        assert (result.products, result.losses) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reports_the_loss_at_its_start_and_descends(name: str, problem: Problem) -> None:
    stepper = get_optimizer(name).create(problem)
    start = problem.evaluate(problem.train).loss
    losses = []
    for _ in range(4):
        expected = problem.evaluate(problem.train).loss
        result = stepper.step(problem, problem.train)
        assert result.loss == pytest.approx(expected, rel=1e-12)
        if result.new_loss is not None:
            assert result.new_loss == pytest.approx(problem.evaluate(problem.train).loss, rel=1e-12)
        losses.append(result.loss)
    assert problem.evaluate(problem.train).loss < start
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_moves_nothing(name: str, problem: Problem) -> None:
    stepper = get_optimizer(name).create(problem)
    stepper.step(problem, problem.train)
    before = [p.detach().clone() for p in problem.parameters]
    bad = Batch(problem.train.inputs * math.nan, problem.train.targets)
    result = stepper.step(problem, bad)
    assert not math.isfinite(result.loss)
    assert result.status == "non_finite"
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))


def test_options_are_checked_by_name(problem: Problem) -> None:
    spec = get_optimizer("sgd")
    assert spec.resolve({"lr": 0.5}) == {"lr": 0.5, "momentum": 0.9}
    with pytest.raises(OptimizerError, match=r"sgd has no option 'mu'. Its options: lr=0.1, momentum=0.9"):
        spec.create(problem, mu=1.0)
    with pytest.raises(OptimizerError, match="sgd refuses"):
        spec.create(problem, lr=-1.0)
    with pytest.raises(OptimizerError, match=r"history is a whole number, got 1\.5"):
        get_optimizer("lbfgs").create(problem, history=1.5)
    with pytest.raises(OptimizerError, match="Did you mean 'lbfgs'"):
        get_optimizer("l-bfgs")


def test_options_reach_the_optimizer(problem: Problem) -> None:
    adam = get_optimizer("adam").create(problem, lr=0.25, beta1=0.5).optimizer
    assert adam.param_groups[0]["lr"] == 0.25
    assert adam.param_groups[0]["betas"] == (0.5, 0.999)
    lbfgs = get_optimizer("lbfgs").create(problem, history=7.0).optimizer
    assert lbfgs.param_groups[0]["history_size"] == 7
