"""What is raced over: published problems, the figures published for them, and the figures to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from benchmarks.strength.run import StrengthRun
from benchmarks.strength.tasks import StrengthTask, Surface
from imstep.runs.records import Point
from imstep.runs.rows import Clock, Limits
from imstep.tasks import PhysicsTask, Problem, get_task

TRIAL = 1 / 4
"""Of a run's seconds, what a trial in tuning has."""
LOOKS = 400
STAIR = 0.7
"""A point of the curve is kept where the error has fallen to this much of that at the last such point."""
GRID = 40
"""Rows and columns of a kept error at most."""

EVERYONE = ("imstep", "adam-lbfgs", "soap-cosine", "newton-cg", "broyden", "spring")
LARGE = tuple(name for name in EVERYONE if name != "broyden")
BALANCE = "imstep-balance"
"""Where what is given at first has to travel into the domain."""
TRAVELLING = (*EVERYONE, BALANCE)


@dataclass(frozen=True)
class Goal:
    """An error to reach, within so many seconds; None for the end of the run."""

    error: float
    seconds: float | None = None

    @property
    def text(self) -> str:
        """The error as in 9.9e-4."""
        mantissa, exponent = f"{self.error:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(frozen=True)
class RaceTask(StrengthTask):
    """A problem of the race.

    Args:
        published: the best figures published, in words.
        goals: the figures to reach.
    """

    published: str = ""
    goals: tuple[Goal, ...] = ()

    @property
    def relative(self) -> bool:
        """Whether the error is relative; else a root mean square."""
        return "relative" in self.about

    def build(self, seed: int, data: object = None) -> Problem:
        return self.recipe.build(seed, dtype=self.dtype)

    def trial_of(self, side: str) -> Limits:
        return Limits(seconds=TRIAL * self.limit)

    def reads(self, run: StrengthRun) -> list[Point | None]:
        errors = [p.heldout if p.heldout == p.heldout else math.inf for p in run.curve]
        lowest, stairs, last = list(accumulate(errors, min)), [], math.inf
        for point, error in zip(run.curve, lowest, strict=True):
            if error <= STAIR * last:
                stairs.append(point)
                last = error
        at_marks = [run.last_at("seconds", mark) for mark in self.marks]
        return [*stairs, run.curve[lowest.index(lowest[-1])], *at_marks, *(reached(run, g.error) for g in self.goals)]

    def error_of(self, problem: Problem, side: str, seed: int) -> Surface | None:
        pair = problem.surfaces() if side == self.own and seed == 0 else None
        if pair is None:
            return None
        solution, found = (thinned_out(surface.values) for surface in pair)
        rows = zip(solution, found, strict=True)
        return tuple(tuple(float(f"{b - a:.3g}") for a, b in zip(*pair, strict=True)) for pair in rows)


def thinned_out(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Every so many rows and columns of a grid."""
    rows, columns = (math.ceil(count / GRID) for count in (len(values), len(values[0])))
    return [list(row[::columns]) for row in values[::rows]]


def reached(run: StrengthRun, error: float) -> Point | None:
    """The first point with an error of at most so much."""
    return next((p for p in run.curve if p.heldout <= error), None)


def _task(
    name: str, seconds: float, published: str, goals: Sequence[Goal], sides: tuple[str, ...] = EVERYONE
) -> RaceTask:
    recipe = get_task(name)
    assert isinstance(recipe, PhysicsTask)
    return RaceTask(
        name,
        recipe.title,
        recipe.description,
        recipe,
        examples=None,
        heldout=None,
        batch_size=None,
        clock=Clock.SECONDS,
        looks=LOOKS,
        limit=seconds,
        trial=math.nan,
        sides=sides,
        marks=(seconds / 10, seconds),
        dtype=torch.float64,
        published=published,
        goals=tuple(goals),
    )


_RATHORE = "Adam and L-BFGS, then NysNewton-CG, 41,000 iterations, float32: {}"
_ALL = (
    _task(
        "poisson-2d",
        40,
        "ENGD 1e-6 after 94 s, 6e-8 after 1,000 s (GPU)",
        [Goal(1e-6, 1.2), Goal(1e-9, 30)],
    ),
    _task("heat-1d", 60, "ENGD 1e-6 after 96 s, 2.8e-8 after 1,000 s (GPU)", [Goal(1e-6, 3), Goal(1e-8, 60)]),
    _task(
        "poisson-5d",
        100,
        "ENGD, averaged Gramian, 1e-6 after 80 s, 5.6e-8 after 3,000 s (GPU)",
        [Goal(1e-6, 10), Goal(3e-8, 100)],
    ),
    _task("burgers-smooth", 60, "DSGNAR 3.9e-7 after 15.6 s (H100)", [Goal(4e-7, 30)]),
    _task(
        "convection",
        80,
        "none for new points in every step; SOAP 1.4e-2 after 109 s (ours, CPU)",
        [Goal(1e-4, 25), Goal(1e-6)],
        TRAVELLING,
    ),
    _task(
        "burgers",
        180,
        "self-scaled Broyden about 1e-7 after 50,000 iterations; 8e-9 with its points weighted (as cited by others)",
        [Goal(1e-6, 120), Goal(1e-8)],
    ),
    _task("reaction", 60, _RATHORE.format("9.9e-3"), [Goal(9.9e-4)], TRAVELLING),
    _task("wave", 100, _RATHORE.format("1.3e-2"), [Goal(1.3e-3)], TRAVELLING),
    _task("convection-40", 120, _RATHORE.format("1.9e-3"), [Goal(1.9e-4)], TRAVELLING),
    _task(
        "poisson-10d",
        120,
        "SPRING 6.2e-5 in the end; 1e-3 (root mean square) after 31 s (GPU)",
        [Goal(1e-3, 60), Goal(1e-4)],
        LARGE,
    ),
    _task(
        "poisson-5d-wide",
        180,
        "SPRING 1e-5 after 224 s, 2.6e-7 after 7,000 s (GPU)",
        [Goal(1e-5, 120), Goal(1e-6)],
        LARGE,
    ),
)
TASKS: dict[str, RaceTask] = {task.name: task for task in _ALL}
