"""NewtonKrylov in the loop: its costs are counted from outside, its options reach it, and it converges."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from imstep.optim import LeastSquares, NewtonKrylov
from imstep.runs.optimizers import OptimizerError, get_optimizer
from imstep.runs.runner import Ending, Limits, StepRow, Trainer
from imstep.tasks import Batch, ExampleProblem, Problem, get_task

SPEC = get_optimizer("newton-krylov")


class Counted(nn.Module):
    """Counts the forward passes of the whole batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.inner(x)


def regression(model: nn.Module, inputs: int = 6, examples: int = 40) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator).double()
    batch = Batch(x, torch.sin(x @ torch.arange(1.0, inputs + 1).double())[:, None])
    return ExampleProblem("regression", model.double(), batch, batch, nn.MSELoss())


@pytest.mark.parametrize("kronecker", [0.0, 1.0])
@pytest.mark.parametrize("hessian", [0.0, 1.0])
def test_every_forward_pass_is_charged(hessian: float, kronecker: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Counted(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)))
    problem = regression(model)
    stepper = SPEC.create(problem, hessian=hessian, kronecker=kronecker)
    for _ in range(6):
        before = model.forwards
        result = stepper.step(problem, problem.train)
        assert model.forwards - before == result.gradients + result.losses
        # Between passes with Gauss-Newton products and recorded passes with Hessian products.
        passes = result.gradients + result.losses / 3
        assert passes + 4 / 3 * result.products <= result.cost + 1e-9
        assert result.cost <= 4 / 3 * passes + 2 * result.products + 2 / 3 + 1e-9


def test_the_cost_follows_from_the_record() -> None:
    trainer = Trainer(problem := get_task("digits-mlp").build(0, examples=60), SPEC.create(problem))
    for row in trainer.run(Limits(epochs=5)):
        if not isinstance(row, StepRow):
            continue
        record: dict[str, Any] = json.loads(json.dumps(row.record))
        weights = {
            "gradients": 1,
            "linearisations": 4 / 3,
            "hessian_products": 2,
            "gauss_newton_products": 4 / 3,
        }
        weights |= {"losses": 1 / 3, "refreshes": 2 / 3}
        assert row.step_cost == pytest.approx(sum(weight * record[name] for name, weight in weights.items()))
        assert (record["loss"], record["new_loss"]) == (row.loss, row.new_loss)
    assert trainer.totals.products > 0
    assert sum(trainer.totals.statuses.values()) == 5


def test_a_linear_problem_ends_by_convergence() -> None:
    problem = regression(nn.Linear(6, 1))
    trainer = Trainer(problem, SPEC.create(problem))
    rows = [row for row in trainer.run(Limits(epochs=200)) if isinstance(row, StepRow)]
    assert trainer.ending is Ending.CONVERGED
    assert rows[-1].status == "converged"
    ones = torch.cat([problem.train.inputs, torch.ones(len(problem.train), 1).double()], dim=1)
    fitted = ones @ torch.linalg.lstsq(ones, problem.train.targets).solution
    least = float((fitted - problem.train.targets).square().mean())
    assert rows[-1].loss == pytest.approx(least, rel=1e-12)


def test_options_are_numbers_with_a_range() -> None:
    problem = regression(nn.Linear(6, 1))
    for name, value in (("theta", -1.0), ("damping", -1.0), ("hessian", 0.5), ("kronecker", 2.0)):
        with pytest.raises(OptimizerError, match="newton-krylov refuses"):
            SPEC.create(problem, **{name: value})
    with pytest.raises(OptimizerError, match="newton-krylov has no option 'speed'"):
        SPEC.create(problem, speed=0.1)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("newton-krylov", NewtonKrylov),
        ("newton-krylov-batches", NewtonKrylov.for_batches),
        ("least-squares", LeastSquares),
    ],
)
def test_names_mean_the_defaults_of_the_library(name: str, own: Callable[..., object]) -> None:
    problem = regression(nn.Linear(6, 1))
    assert repr(get_optimizer(name).create(problem).optimizer) == repr(own(problem.parameters))
