"""Points drawn anew in every step: what keeps a step from fitting its own at the expense of all others?

python -m benchmarks.redrawn_points           # what the record lacks; writes record.json and the page
python -m benchmarks.redrawn_points --table   # the page again, from the record

Small versions of three tasks, and derivatives of a residual as further rows; float64, one thread. Steps and
gradient-equivalents are counted, not seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import geometric_mean
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.record_page import Row, command, table
from imstep import LeastSquares, pde
from imstep.curvature import ResidualJacobian
from imstep.curvature.parameters import ParameterVector
from imstep.optim import EarlierDraws, ExponentialAverage
from imstep.optim.record import Cost
from imstep.tasks import PhysicsTask, get_task
from imstep.tasks.models import Periodic, mlp
from imstep.tasks.physics import Condition, PhysicsProblem, Points
from imstep.tasks.sampling import boundary, box

NAME = "redrawn-points"
F64 = torch.float64
SEEDS = (0, 1, 2)
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
    sides: list[tuple[float, float]]

    def build(self, seed: int) -> PhysicsProblem:
        """With Sobol's points, whatever the task has."""
        task = get_task(self.task)
        assert isinstance(task, PhysicsTask)
        conditions = tuple(replace(condition, by_residual=None) for condition in task.conditions)
        recipe = replace(task, network=self.network, conditions=conditions)
        return recipe.build(seed, dtype=F64, examples=self.points)


CASES = {
    "Poisson 5D": Case(
        "poisson-5d", "225 parameters, 350 points", partial(mlp, (5, 32, 1)), 350, 100, [(0.0, 1.0)] * 5
    ),
    "Burgers": Case(
        "burgers-smooth",
        "625 parameters, 400 points",
        lambda: nn.Sequential(Periodic(0, 2.0), mlp((3, 16, 16, 16, 1))),
        400,
        60,
        [(-1.0, 1.0), (0.0, 1.0)],
    ),
    "Poisson 10D": Case(
        "poisson-10d", "2,929 parameters, 150 points", partial(mlp, (10, 48, 48, 1)), 150, 60, [(0.0, 1.0)] * 10
    ),
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


class Weighted(Plain):
    """The equation's points lie closer where its residual is large, with weights."""

    def __init__(self, problem: PhysicsProblem, floor: float) -> None:
        super().__init__(problem)
        self.options: dict[str, Any] = {"floor": floor, "dtype": F64}

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        condition, generator = problem.conditions[0], torch.Generator().manual_seed(self.optimizer._memory.steps)
        sides = next(case.sides for case in CASES.values() if case.task == problem.task)
        missed = partial(condition.residual, problem.model)
        chosen, weights = pde.weighted_points(missed, sides, condition.count, generator=generator, **self.options)
        none = [None] * (len(points.of) - 1)
        return super().__call__(problem, Points((chosen, *points.of[1:]), (weights, *none))) + Cost(losses=4)


class Independent(Plain):
    """At points that do not know of each other, in place of Sobol's."""

    def __call__(self, problem: PhysicsProblem, points: Points) -> Cost:
        generator = torch.Generator().manual_seed(self.optimizer._memory.steps)
        pairs = zip(problem.conditions, points.of, strict=True)
        chosen = Points(tuple(independent(condition, x.shape[1], generator) for condition, x in pairs))
        return super().__call__(problem, chosen)


def independent(condition: Condition, dimensions: int, generator: Generator) -> Tensor:
    """Sequences of one point a face, which are scrambled independently of each other."""
    faces = 2 * dimensions if condition.name == "boundary" else 1
    draws = [condition.draw(faces, generator) for _ in range(ceil(condition.count / faces))]
    return torch.cat(draws)[: condition.count]


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
    "independent points": Independent,
    "recall, decay 0.5": partial(Plain, recall=EarlierDraws(0.5)),
    "recall, decay 0.2": partial(Plain, recall=EarlierDraws(0.2)),
    "momentum 0.8": partial(Plain, momentum=0.8),
    "SPRING: rate 0.06, momentum 0.968, damping 1e-4": partial(Spring, rate=0.06, momentum=0.968, damping=1e-4),
    "average of iterates, decay 0.8": partial(Averaged, average=ExponentialAverage(0.8)),
    "damping by the spread between draws, up to 4": partial(BySpread, most=4.0),
    "points by residuals, without weights": ByResidual,
    "points by residuals, with weights": partial(Weighted, floor=1.0),
    "points by residuals, with weights, floor 4": partial(Weighted, floor=4.0),
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


ROWS = ((20, 0.0), (20, 0.01), (60, 0.0))
"""Points inside the square, and the weight of the squares of the residual's derivatives there."""


def with_derivatives(count: int, weight: float, redrawn: bool, seed: int) -> Row:
    """Poisson's equation in the square by 2-32-1, 40 steps, with the residual's derivatives as further rows."""
    torch.manual_seed(seed)
    u, waves = mlp((2, 32, 1)).double(), lambda x: torch.sin(torch.pi * x).prod(1, keepdim=True)
    inside, edge = box([(0.0, 1.0)] * 2), boundary([(0.0, 1.0)] * 2)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: (inside(count, generator).requires_grad_(weight > 0), edge(80, generator))
    x, ends = draw()

    def loss() -> Tensor:
        missed = pde.laplacian(u, x) + 2 * torch.pi**2 * waves(x)
        total = missed.square().mean() + u(ends).square().mean()
        if weight == 0:
            return total
        (slopes,) = torch.autograd.grad(missed.sum(), x, create_graph=True)
        return total + weight * slopes.square().sum(1).mean()

    optimizer = LeastSquares(u.parameters())
    for _ in range(40):
        optimizer.step(loss)
        x, ends = draw() if redrawn else (x, ends)
    other = inside(2000, generator)
    error = float((u(other) - waves(other)).detach().square().mean().sqrt())
    return {"error": float(f"{error:.3g}"), "gradients": round(optimizer.cost.gradient_equivalents)}


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        **{
            f"{name}; {side}; {seed}": partial(run, name, side, seed)
            for seed in SEEDS
            for side in SIDES
            for name in CASES
        },
        **{
            f"derivatives; {count}; {weight:g}; {redrawn}; {seed}": partial(
                with_derivatives, count, weight, redrawn, seed
            )
            for seed in range(3)
            for count, weight in ROWS
            for redrawn in (False, True)
        },
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
    parts += ["**Derivatives as further rows**, Poisson's equation in the square, 40 steps, three starts:"]
    body = []
    for count, weight in ROWS:
        cells = []
        for redrawn in (False, True):
            made = [record["runs"][f"derivatives; {count}; {weight:g}; {redrawn}; {seed}"] for seed in range(3)]
            mean = _mean(made)
            cells += [f"{mean['error']:.1e}", f"{mean['gradients']:.0f}"]
        body.append([f"{count} points, weight {weight:g}", *cells])
    heads = ["", "error, points that stay", "gradients", "error, points redrawn", "gradients"]
    return "\n\n".join([*parts, table(heads, body)])


def _mean(moments: list[Row]) -> Row:
    """Geometric, over seeds."""
    return {key: geometric_mean([float(moment[key]) for moment in moments]) for key in moments[0]}


if __name__ == "__main__":
    command(__doc__, NAME, "redrawn-points", text_of, runs)
