"""Points drawn anew in every step: what keeps a step from fitting its own at the expense of all others?

python -m benchmarks.redrawn_points           # what the record lacks; writes record.json and the page
python -m benchmarks.redrawn_points --table   # the page again, from the record

Small versions of three tasks, float64, one thread. Steps and gradient-equivalents are counted, not seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from benchmarks.record_page import Row, command, table
from imstep import LeastSquares, pde
from imstep.curvature import ResidualJacobian
from imstep.curvature.parameters import ParameterVector
from imstep.optim import EarlierDraws, ExponentialAverage
from imstep.optim.record import Cost
from imstep.tasks import PhysicsTask, get_task
from imstep.tasks.models import Periodic, mlp
from imstep.tasks.physics import PhysicsProblem, Points

NAME = "redrawn-points"
F64 = torch.float64
SEEDS = (0,)
MOMENTS = 4


# --- problems -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A task with another network and other counts of points, and the steps to take."""

    task: str
    text: str
    network: Callable[[], nn.Module]
    points: int
    steps: int

    def build(self, seed: int) -> PhysicsProblem:
        task = get_task(self.task)
        assert isinstance(task, PhysicsTask)
        return replace(task, network=self.network).build(seed, dtype=F64, examples=self.points)


CASES = {
    "Poisson 5D": Case("poisson-5d", "225 parameters, 350 points", partial(mlp, (5, 32, 1)), 350, 100),
    "Burgers": Case(
        "burgers-smooth",
        "625 parameters, 400 points",
        lambda: nn.Sequential(Periodic(0, 2.0), mlp((3, 16, 16, 16, 1))),
        400,
        60,
    ),
    "Poisson 10D": Case("poisson-10d", "2,929 parameters, 150 points", partial(mlp, (10, 48, 48, 1)), 150, 60),
}


# --- sides --------------------------------------------------------------------------------------------------------



class Plain:
    """Steps of `LeastSquares`, with options."""

    def __init__(self, problem: PhysicsProblem, **options: Any) -> None:
        self.optimizer = LeastSquares(problem.parameters, **options)

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        self.optimizer.step(problem.closure(points))
        return self.optimizer.last_step.cost

    def evaluate(self, problem: PhysicsProblem) -> float:
        return problem.evaluate(problem.heldout).loss


class Averaged(Plain):
    """Evaluated at the average of the iterates."""

    def evaluate(self, problem: PhysicsProblem) -> float:
        with self.optimizer.averaged():
            return super().evaluate(problem)


class BySpread(Plain):
    """λ grows where the loss at the next points is above that where the step ended by more than a factor, and cannot
    fall faster than that says."""

    def __init__(self, problem: PhysicsProblem, most: float) -> None:
        super().__init__(problem)
        self.most = most

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        last, memory = self.optimizer.last_step, self.optimizer._memory
        if last is not None:
            spread = float(problem.closure(points)().detach()) / last.new_loss
            least = last.damping / memory.curvature_scale * min(max(spread / self.most, 0.5), 4.0)
            self.optimizer._memory = replace(memory, damping=max(memory.damping, least))
        return super().__call__(problem, points)


class ByResidual(Plain):
    """The equation's points are drawn where its residual is large, of five times as many."""

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        condition, generator = problem.conditions[0], torch.Generator().manual_seed(self.optimizer._memory.steps)
        candidates = condition.draw(5 * condition.count, generator)
        missed = partial(condition.residual, problem.model)
        chosen = pde.adaptive_points(missed, candidates, condition.count, generator=generator)
        return super().__call__(problem, Points((chosen, *points.of[1:]))) + Cost(losses=5)


class Spring(Plain):
    """As published: a fixed rate, damping and momentum; no corrections, no step is judged."""

    def __init__(self, problem: PhysicsProblem, rate: float, momentum: float, damping: float) -> None:
        self.parameters = ParameterVector(problem.parameters)
        self.rate, self.momentum, self.damping = rate, momentum, damping
        self.move = torch.zeros(self.parameters.size, dtype=F64)

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        J = ResidualJacobian(problem.closure(points), problem.parameters)
        shift = self.momentum * self.move
        matrix = J.gram().dense() + self.damping * torch.eye(len(J.residuals), dtype=F64)
        self.move = shift - J.T @ torch.linalg.solve(matrix, J.residuals + J @ shift)
        self.parameters.set(self.parameters.get() + self.rate * self.move)
        return Cost(losses=J.evaluations, jacobian_passes=J.backward_passes)


SIDES: dict[str, Callable[[PhysicsProblem], Plain]] = {
    "each step its own points only": Plain,
    "recall, decay 0.5": partial(Plain, recall=EarlierDraws(0.5)),
    "recall, decay 0.2": partial(Plain, recall=EarlierDraws(0.2)),
    "momentum 0.8": partial(Plain, momentum=0.8),
    "SPRING: rate 0.06, momentum 0.968, damping 1e-4": partial(Spring, rate=0.06, momentum=0.968, damping=1e-4),
    "average of iterates, decay 0.8": partial(Averaged, average=ExponentialAverage(0.8)),
    "damping by the spread between draws, up to 4": partial(BySpread, most=4.0),
    "points by residuals": ByResidual,
}


# --- runs ---------------------------------------------------------------------------------------------------------


def run(name: str, side: str, seed: int) -> Row:
    """The error against the solution, the loss at points of which no step saw any, and gradient-equivalents."""
    case = CASES[name]
    problem = case.build(seed)
    stepper, cost, moments = SIDES[side](problem), 0.0, []
    for number, points in zip(range(1, case.steps + 1), _draws(problem, seed), strict=False):
        cost += stepper(problem, points).gradient_equivalents
        if number % (case.steps // MOMENTS) == 0:
            loss = problem.evaluate(problem.train).loss
            moments.append({"step": number, "error": stepper.evaluate(problem), "loss": loss, "gradients": cost})
    return {"moments": [{key: float(f"{value:.3g}") for key, value in moment.items()} for moment in moments]}


def _draws(problem: PhysicsProblem, seed: int) -> Iterator[Points]:
    epoch = 0
    while True:
        yield from problem.batches(epoch, seed=seed)
        epoch += 1


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{name}; {side}; {seed}": partial(run, name, side, seed) for seed in SEEDS for side in SIDES for name in CASES
    }


# --- the page -----------------------------------------------------------------------------------------------------


def text_of(record: dict[str, Any]) -> str:
    """A table for each problem."""
    parts = []
    for name, case in CASES.items():
        body = []
        for side in SIDES:
            rows = [record["runs"][key] for seed in SEEDS if (key := f"{name}; {side}; {seed}") in record["runs"]]
            if rows:
                means = [_mean([row["moments"][at] for row in rows]) for at in range(MOMENTS)]
                cells = [f"{mean['error']:.1e}" for mean in means]
                body.append([side, *cells, f"{means[-1]['loss']:.1e}", f"{means[-1]['gradients']:.0f}"])
        heads = [f"error after {(at + 1) * case.steps // MOMENTS}" for at in range(MOMENTS)]
        parts += [f"**{name}** ({case.text} a step):", table(["", *heads, "loss then", "gradients"], body)]
    return "\n\n".join(parts)


def _mean(moments: list[Row]) -> Row:
    """Geometric, over seeds."""
    return {key: geometric_mean([float(moment[key]) for moment in moments]) for key in moments[0]}


if __name__ == "__main__":
    command(__doc__, NAME, "redrawn-points", text_of, runs)
