"""What is trained: the data, the models, how long a run goes on, and where its curve is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from imstep.runs.records import Point
from imstep.runs.rows import Clock, Limits, Schedule
from imstep.tasks import Problem, Task, get_task

if TYPE_CHECKING:
    from benchmarks.strength.run import StrengthRun

TUNING_SEED = 100

Surface = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class StrengthTask:
    """A task of the comparison.

    Args:
        name: for the command line and the record's file.
        title: a heading.
        about: data, model and loss in a sentence.
        recipe: data, model and loss.
        examples: how many of the training examples are used; None for all.
        heldout: how many of the held-out examples are looked at; None for all.
        batch_size: examples a step; None for the full batch.
        clock: what a run is limited by and read at, cost or seconds.
        looks: evaluations a run.
        limit: of a run, on that clock.
        trial: gradient-equivalents of a trial in tuning.
        sides: who takes part.
        marks: where on the clock losses are read.
        levels: training losses whose cost and seconds are read.
        limits: of sides that go on longer or shorter than `limit`.
        trials: gradient-equivalents of trials of sides whose steps take more or less time than a gradient.
        dtype: of data and model.
        own: the configuration of imstep that the figures to reach are about.
        race: the training loss to which seconds are compared; None for the last level, each level's cost then being
            bounded by its mark.
        share: how much of the fastest SOAP's seconds that may take.
        lowest: a bound on the lowest training loss of every seed; None for no bound.
    """

    name: str
    title: str
    about: str
    recipe: Task
    examples: int | None
    heldout: int | None
    batch_size: int | None
    clock: Clock
    looks: int
    limit: float
    trial: float
    sides: tuple[str, ...]
    marks: tuple[float, ...]
    levels: tuple[float, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    trials: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    own: str = "imstep"
    race: float | None = None
    share: float = 1 / 3
    lowest: float | None = None

    @property
    def axis(self) -> str:
        """The clock's name among the entries of a point of a curve."""
        return "cost" if self.clock is Clock.COST else "seconds"

    def build(self, seed: int, data: Path | None) -> Problem:
        """Data and a fresh model.

        Raises:
            DataNotFoundError: the data set is not installed.
        """
        problem = self.recipe.build(seed, dtype=self.dtype, data=data, examples=self.examples)
        return replace(problem, heldout=problem.heldout.take(slice(0, self.heldout)))

    def limits_of(self, side: str) -> Limits:
        """When a recorded run of the side ends."""
        limit = self.limits.get(side, self.limit)
        return Limits(budget=limit) if self.clock is Clock.COST else Limits(seconds=limit)

    def trial_of(self, side: str) -> Limits:
        """When a trial of the side ends: by cost, so that tuning is the same on every machine."""
        return Limits(budget=self.trials.get(side, self.trial))

    def reads(self, run: StrengthRun) -> list[Point | None]:
        """The points of a run's curve that tables read."""
        at_marks = [read(self.axis, mark) for mark in self.marks for read in (run.best_at, run.last_at)]
        return [*at_marks, *(run.first_below(level) for level in self.levels)]

    def error_of(self, problem: Problem, side: str, seed: int) -> Surface | None:
        """The error of the solution on a grid at the end of a run, if the record is to keep it."""
        return None

    def schedule_of(self, limits: Limits, looks: int) -> Schedule:
        """Evaluations so many times a run, at equal distances on its clock."""
        if limits.seconds is not None:
            return Schedule(limits.seconds / looks, Clock.SECONDS)
        return Schedule((limits.budget or 1.0) / looks, Clock.COST)


def _autoencoder() -> nn.Sequential:
    """784-128-32-128-784: tanh inside, the code included, sigmoid at the end; Xavier-normal, zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((784, 128, 32, 128, 784)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


_AUTOENCODER = replace(get_task("fashion-autoencoder"), model=_autoencoder)
_ABOUT = (
    "{} pictures of Fashion-MNIST, {} test pictures held out; 784-128-32-128-784, tanh, sigmoid output, Xavier-normal "
    "weights, zero biases; mean squared error; float32."
)
_SECONDS = (10.0, 30.0, 60.0)


def _convection(dtype: torch.dtype, lowest: float | None, points: str = "") -> StrengthTask:
    name, recipe = str(dtype).removeprefix("torch."), get_task(f"convection-{points or 'sobol'}")
    return StrengthTask(
        f"convection{points and f'-{points}'}-{name}",
        f"{recipe.title}, {name}",
        recipe.description,
        recipe,
        examples=None,
        heldout=None,
        batch_size=None,
        clock=Clock.COST,
        looks=400,
        limit=4000,
        trial=2000,
        # What is raced follows directly, so that the machine's mood is the same for both.
        sides=("imstep-residual", "soap-cosine", "soap", "adam", "lbfgs"),
        marks=(4000,),
        levels=(1e-4, 1e-6, 1e-9),
        limits={"imstep-residual": 700},
        trials={"imstep-residual": 450, "soap-cosine": 4000},
        dtype=dtype,
        own="imstep-residual",
        race=1e-6,
        share=1 / 2,
        lowest=lowest,
    )


_ALL = (
    StrengthTask(
        "autoencoder",
        "Autoencoder, full batch",
        _ABOUT.format("The first 2,000", "2,000"),
        _AUTOENCODER,
        examples=2000,
        heldout=2000,
        batch_size=None,
        clock=Clock.COST,
        looks=300,
        limit=1500,
        trial=600,
        sides=("imstep", "adam", "lbfgs", "muon", "soap", "soap-cosine"),
        marks=(450, 1200),
        levels=(5.7e-3, 4.25e-3),
        limits={"soap": 5500, "soap-cosine": 2000},
        # Its longer runs ask for lower rates than a short trial would choose.
        trials={"soap": 1500, "soap-cosine": 1500},
    ),
    StrengthTask(
        "digits-cnn",
        "Digits CNN, mini-batches",
        get_task("digits-cnn").description,
        get_task("digits-cnn"),
        examples=None,
        heldout=None,
        batch_size=512,
        clock=Clock.SECONDS,
        looks=30,
        limit=30,
        trial=200,
        sides=("imstep-batches", "adam", "sgd", "soap", "soap-cosine"),
        marks=_SECONDS[:2],
        own="imstep-batches",
    ),
    StrengthTask(
        "autoencoder-batches",
        "Autoencoder, mini-batches",
        _ABOUT.format("The first 20,000", "all 10,000"),
        _AUTOENCODER,
        examples=20_000,
        heldout=None,
        batch_size=512,
        clock=Clock.SECONDS,
        looks=60,
        limit=60,
        trial=40,
        sides=("imstep-batches", "adam", "sgd", "soap", "soap-cosine"),
        marks=_SECONDS,
        own="imstep-batches",
    ),
    _convection(torch.float32, lowest=None),
    _convection(torch.float64, lowest=1e-9),
    _convection(torch.float32, lowest=None, points="random"),
)
TASKS: dict[str, StrengthTask] = {task.name: task for task in _ALL}
