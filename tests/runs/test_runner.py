"""The loop ends where it is told, charges what it should, and gives the same numbers every time."""

import dataclasses
import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from imstep.runs.optimizers import LOSS_COST, OPTIMIZERS, get_optimizer
from imstep.runs.runner import (
    Clock,
    Ending,
    EvaluationRow,
    Limits,
    Schedule,
    StepRow,
    Trainer,
    TrainingError,
)
from imstep.runs.seconds import Seconds
from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import Batch, ExampleProblem, get_task


def small(optimizer: str = "adam", **settings: object) -> Trainer:
    task = get_task("convection-sobol" if optimizer == "least-squares" else "digits-mlp")
    problem = task.build(0, examples=100)
    return Trainer(problem, get_optimizer(optimizer).create(problem), **settings)  # type: ignore[arg-type]


def test_rows_add_up() -> None:
    trainer = small(batch_size=30)
    rows = list(trainer.run(Limits(epochs=3)))
    steps = [row for row in rows if isinstance(row, StepRow)]
    evaluations = [row for row in rows if isinstance(row, EvaluationRow)]
    assert trainer.ending is Ending.EPOCHS
    assert [row.step for row in steps] == list(range(1, 13))
    assert [row.step for row in evaluations] == [0, 4, 8, 12]
    # One gradient of every example is one gradient-equivalent of the training set.
    assert [row.cost for row in evaluations] == pytest.approx([0, 1, 2, 3])
    assert math.fsum(row.step_cost for row in steps) == pytest.approx(trainer.totals.cost)
    assert trainer.totals.gradients == 12
    assert trainer.totals.evaluation_cost == pytest.approx(4 * LOSS_COST * 397 / 100)
    assert trainer.totals.seconds == steps[-1].seconds
    assert trainer.epoch == 3
    assert all(a.seconds <= b.seconds for a, b in pairwise(rows))


def test_a_full_batch_step_costs_what_the_optimizer_says() -> None:
    trainer = small("lbfgs")
    rows = [row for row in trainer.run(Limits(budget=50)) if isinstance(row, StepRow)]
    assert trainer.ending is Ending.BUDGET
    assert trainer.totals.cost == trainer.totals.gradients
    assert rows[-2].cost < 50 <= rows[-1].cost


def test_evaluations_follow_the_clock() -> None:
    trainer = small(schedule=Schedule(10, Clock.COST))
    rows = [row for row in trainer.run(Limits(budget=35)) if isinstance(row, EvaluationRow)]
    assert [row.cost for row in rows] == [0, 10, 20, 30, 35]

    trainer = small(schedule=Schedule(0.02, Clock.SECONDS))
    rows = [row for row in trainer.run(Limits(seconds=0.1)) if isinstance(row, EvaluationRow)]
    assert [int(row.seconds / 0.02) for row in rows[:-1]] == sorted({int(row.seconds / 0.02) for row in rows[:-1]})


def test_the_seconds_limit_ends_a_run() -> None:
    trainer = small()
    list(trainer.run(Limits(seconds=0.02)))
    assert trainer.ending is Ending.SECONDS
    assert trainer.totals.seconds >= 0.02


class Waiting(Stepper):
    """Steps that wait for something else than the processor."""

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)

    def step(self, problem: object, batch: object) -> StepResult:
        time.sleep(0.05)
        return StepResult(1.0, 1.0)


def test_processor_seconds_leave_out_what_else_goes_on() -> None:
    problem = get_task("digits-mlp").build(0, examples=10)
    spent = {}
    for clock in Seconds:
        trainer = Trainer(problem, Waiting(), seconds=clock)
        list(trainer.run(Limits(epochs=2)))
        spent[clock] = trainer.totals.seconds
    assert spent[Seconds.WALL] >= 0.1
    assert spent[Seconds.PROCESSOR] < 0.02
    list(Trainer(problem, (sgd := get_optimizer("sgd")).create(problem), seconds=clock).run(Limits(seconds=0.02)))
    for device, processes, words in (("cuda", 1, "cuda computes"), ("cpu", 2, "2 processes compute together")):
        with pytest.raises(TrainingError, match=words):
            Seconds.PROCESSOR.check(torch.device(device), processes)
        Seconds.WALL.check(torch.device(device), processes)
    torch.set_num_threads(2)
    try:
        with pytest.raises(TrainingError, match="2 threads compute"):
            Trainer(problem, sgd.create(problem), seconds=Seconds.PROCESSOR)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_do_not_depend_on_the_outside(name: str) -> None:
    def losses(draws: int) -> list[float]:
        trainer, found = small(name, batch_size=50, seed=5), []
        for row in trainer.run(Limits(epochs=2)):
            torch.rand(draws)
            found.append(row.loss if isinstance(row, StepRow) else row.heldout_loss)
        return found

    assert losses(1) == losses(17)


def test_the_run_draws_from_its_own_stream() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1))
    batch = Batch(torch.randn(20, 3), torch.randn(20, 1))
    problem = ExampleProblem("t", model, batch, batch, nn.MSELoss())
    before = torch.get_rng_state()
    trainer = Trainer(problem, get_optimizer("sgd").create(problem, lr=0.0), seed=3)
    losses = [row.loss for row in trainer.run(Limits(epochs=4)) if isinstance(row, StepRow)]
    assert torch.equal(torch.get_rng_state(), before)
    # Weights stand still (lr = 0), so only fresh dropout masks can change the loss.
    assert len(set(losses)) == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_without_finite_losses_is_given_up(name: str) -> None:
    trainer = small(name)
    if name == "least-squares":  # of squares of residuals, aimed at nowhere
        bad = Batch(trainer.problem.train.inputs, trainer.problem.train.targets * math.nan)
    else:
        bad = Batch(trainer.problem.train.inputs * math.inf, trainer.problem.train.targets)
    trainer.problem = dataclasses.replace(trainer.problem, train=bad)
    rows = list(trainer.run(Limits(epochs=50)))
    assert trainer.ending is Ending.DIVERGED
    assert trainer.totals.steps == 3
    assert trainer.totals.statuses["non_finite"] == 3
    assert isinstance(rows[-1], EvaluationRow)


def test_limits_and_schedules_are_checked() -> None:
    with pytest.raises(TrainingError, match="without a limit never ends"):
        Limits()
    with pytest.raises(TrainingError, match="budget=0"):
        Limits(budget=0)
    with pytest.raises(TrainingError, match="epochs=nan"):
        Limits(epochs=math.nan)
    with pytest.raises(TrainingError, match="every 0"):
        Schedule(0)
