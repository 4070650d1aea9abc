"""Physics-informed tasks: a network is to satisfy equations at points that are drawn anew for every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from imstep import pde
from imstep.curvature import SumOverBatches
from imstep.optim import GrowingPoints, MicroBatches
from imstep.tasks.base import Evaluation, Metric, Problem, Surface, Task, TaskError, mix, span
from imstep.tasks.blame import in_parts_of

__all__ = ["Condition", "PhysicsProblem", "PhysicsTask", "Points", "Reference"]

CHECK = -1
"""In place of an epoch: the draw that the training loss is reported on, which no step sees."""

_COMPONENTS = 8
"""Of a residual: where there are more, and as many as points, a row and a column have met instead."""


@dataclass(frozen=True)
class Condition:
    """What a network is to satisfy at points of one kind: an equation, initial or boundary values, data.

    Args:
        name: for tables, such as "equation".
        residual: `residual(network, points)` -> (k, m): what is missed at points (k, d); to be zero.
        draw: `draw(count, generator)` -> (count, d) points, float64, on the CPU.
        count: points a step.
        weight: of the mean square of this residual in the loss, > 0.
        by_residual: the sides of a box, in which :func:`imstep.pde.weighted_points` puts the points of steps: closer
            where this residual is large, with weights that leave the loss what it is. `draw`, which is to be uniform
            there, draws those that losses are reported at, and those that stay for all steps. None for `draw`.

    Raises:
        TaskError: a number is out of range.
    """

    name: str
    residual: Callable[[nn.Module, Tensor], Tensor]
    draw: Callable[[int, Generator], Tensor]
    count: int
    weight: float = 1.0
    by_residual: Sequence[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.weight < math.inf:
            raise TaskError(
                f"condition {self.name!r} needs a count of at least 1 and a positive weight, got {self.count} and "
                f"{self.weight}."
            )

    def loss(self, model: nn.Module, points: Tensor, weights: Tensor | None = None) -> Tensor:
        """What this adds to the loss at points (k, d), which may have weights (k, 1).

        Raises:
            TaskError: the residual is not one a point.
        """
        missed = self.residual(model, points)
        self._check(missed, len(points))
        squares = missed.square()
        return self.weight * (squares if weights is None else weights * squares).mean()

    def _check(self, missed: object, count: int) -> None:
        """Whether a residual is what is missed at so many points."""
        if not isinstance(missed, Tensor):
            raise TaskError(
                f"the residual of condition {self.name!r} is an object of type {type(missed).__name__}, not a tensor "
                "of what is missed at the points. Join several by torch.cat([first, second], 1)."
            )
        shape = tuple(missed.shape)
        if shape[:1] != (count,):
            raise TaskError(
                f"the residual of condition {self.name!r} has the shape {shape} at {count} points: return what is "
                f"missed at each of them, ({count}, m), not a mean or a loss."
            )
        if len(shape) > 1 and shape[1] == count > _COMPONENTS:
            raise TaskError(
                f"the residual of condition {self.name!r} has the shape {shape} at {count} points, as where a column "
                f"({count}, 1) and a row ({count},) are combined: each point then meets all others. Take points[:, :1] "
                "for points[:, 0], or values[:, None] for values."
            )


@dataclass(frozen=True)
class Reference:
    """A solution to measure the error against.

    Args:
        points: where, (k, d), float64; for a picture, of a grid that runs along the second axis of `shape` first.
        values: the solution there, (k, m), float64: the first m components of a network's values.
        relative: whether the error is divided by the solution's norm; else it is a root mean square.
        shape: (rows, columns) of the grid, to draw the first component; None where it is no grid.
        axes: the coordinates that run along columns and rows, and their names.

    Raises:
        TaskError: shapes do not fit; the error is relative to zero.
    """

    points: Tensor
    values: Tensor
    relative: bool = True
    shape: tuple[int, int] | None = None
    axes: tuple[tuple[int, str], tuple[int, str]] = ((0, "x"), (1, "t"))

    def __post_init__(self) -> None:
        points, values = tuple(self.points.shape), tuple(self.values.shape)
        if len(points) != 2 or len(values) != 2 or points[0] != values[0]:
            raise TaskError(
                f"a reference has points (k, d) and values (k, m), got {points} and {values}. Write values[:, None] "
                "for one component."
            )
        if self.relative and not bool(self.values.any()):
            raise TaskError("a reference that is zero everywhere has no relative error: give relative=False.")


@dataclass(frozen=True, eq=False)
class Points:
    """Points of a domain, kind by kind.

    Args:
        of: each condition, (k, d).
        weights: of each condition's points, (k, 1), mean about 1, or None for 1; None for none at all.
    """

    of: tuple[Tensor, ...]
    weights: tuple[Tensor | None, ...] | None = None

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Points and weights of each condition."""
        return tuple(zip(self.of, self.weights or [None] * len(self.of), strict=True))

    def __len__(self) -> int:
        return sum(map(len, self.of))


@dataclass(frozen=True, eq=False)
class PhysicsProblem(Problem):
    """Conditions on a network.

        loss = Σ weight · mean of residual²   over the conditions; of points with weights the mean is a weighted one

    Args:
        task: name of the task.
        model: maps points (k, d) to values (k, m); the only mutable part.
        conditions: what it is to satisfy.
        heldout: the solution; the held-out loss is the error of the network against it. Where none is known, points
            of which no step sees any; the held-out loss is the loss there.
        train: a draw of points for reporting the loss, which no step sees where points are redrawn.
        other: another, which no step sees.
        dtype: of the points.
        redrawn: whether every step has points of its own; else all have those of `train`.
        first: points of the first steps, in all; they become more where steps come to hold at their own points only
            (`imstep.optim.GrowingPoints`). None for as many as the conditions say.
        last: points that these become at most. None for as many as the conditions say.
        balanced: whether optimizers that can weigh the conditions anew in every step (`imstep.optim.EqualTraces`).
        metric: None.
    """

    task: str
    model: nn.Module
    conditions: Sequence[Condition]
    heldout: Reference | Points
    train: Points
    other: Points
    dtype: torch.dtype
    redrawn: bool = True
    first: int | None = None
    last: int | None = None
    balanced: bool = False
    metric: Metric | None = None

    @property
    def data(self) -> str:
        kinds = ", ".join(f"{c.count:,} {c.name}" for c in self.conditions)
        return f"{len(self.train):,} points {'redrawn each step' if self.redrawn else 'for all steps'} ({kinds})"

    def closure(self, batch: Points) -> Callable[[], Tensor]:
        return lambda: self._loss(batch)

    def share(self, batch: Points, rank: int, size: int) -> MicroBatches:
        mine = lambda x: x[span(len(x), rank, size)]
        own = Points(*zip(*((mine(x), None if w is None else mine(w)) for x, w in batch.pairs), strict=True))
        shares = [len(part) / len(x) for part, x in zip(own.of, batch.of, strict=True)]
        parts = [own] if len(own) else []
        return MicroBatches(lambda part: self._loss(part, shares), parts, reduction=SumOverBatches())

    @property
    def elsewhere(self) -> Points | None:
        return None if self.redrawn else self.other

    def _loss(self, batch: Points, shares: Sequence[float] | None = None) -> Tensor:
        """The loss; or what points that are such shares of a batch add to that of the batch."""
        of = zip(self.conditions, batch.pairs, shares or [1.0] * len(batch.of), strict=True)
        terms = [share * condition.loss(self.model, *pair) for condition, pair, share in of if share]
        return torch.stack(terms).sum()

    def batch_count(self, batch_size: int | None) -> int:
        if batch_size is not None:
            raise TaskError(
                f"batch_size={batch_size}: a physics-informed task draws as many points a step as its conditions say. "
                "Leave it out, or change the counts (--examples, or Condition.count)."
            )
        return 1

    def batches(self, epoch: int, batch_size: int | None = None, seed: int = 0) -> Iterator[Points]:
        self.batch_count(batch_size)
        yield self._drawn(self.conditions, mix(seed, epoch)) if self.redrawn else self.train

    def beginning_with(self, points: int) -> PhysicsProblem:
        if not self.redrawn:
            raise TaskError(
                f"{self.task} keeps its points in all steps, so there can be no more later. Let them be redrawn, or "
                "leave out the points to begin with."
            )
        if not 1 <= points <= self._last:
            raise TaskError(
                f"{self.task} can begin with 1 to {self._last} points, which it has in the end, got {points}."
            )
        return replace(self, first=points)

    def growing(self) -> GrowingPoints | None:
        if (self.first is None and self.last is None) or not self.redrawn:
            return None
        return GrowingPoints(self._total if self.first is None else self.first, largest=self._last)

    @property
    def _total(self) -> int:
        return sum(c.count for c in self.conditions)

    @property
    def _last(self) -> int:
        return self._total if self.last is None else self.last

    def drawn(self, epoch: int, seed: int, count: int) -> Points:
        return self._drawn(of_all(self.conditions, count), mix(seed, epoch))

    def _drawn(self, conditions: Sequence[Condition], seed: int) -> Points:
        """Points for a step, a function of the seed and, where residuals decide, the model."""
        generator = Generator().manual_seed(seed)
        pairs = [self._points(condition, generator) for condition in conditions]
        return Points(*zip(*pairs, strict=True))

    def _points(self, condition: Condition, generator: Generator) -> tuple[Tensor, Tensor | None]:
        if condition.by_residual is None:
            return condition.draw(condition.count, generator).to(self.device, self.dtype), None
        with self.evaluating(), torch.enable_grad():  # residuals may take derivatives by autograd
            return pde.weighted_points(
                partial(condition.residual, self.model),
                condition.by_residual,
                condition.count,
                generator=generator,
                dtype=self.dtype,
                device=self.device,
            )

    def evaluate(self, batch: Points | Reference) -> Evaluation:
        if isinstance(batch, Points):
            # Residuals may take derivatives by autograd.
            with self.evaluating(), torch.enable_grad(), in_parts_of(self.task):
                return Evaluation(float(self._loss(batch).detach()), None, len(batch))
        found, wanted = self._values(batch)[:, : batch.values.shape[1]], batch.values
        if found.shape != wanted.shape:
            raise TaskError(
                f"the reference of {self.task} has values {tuple(wanted.shape)}, and the network gives "
                f"{tuple(found.shape)}: it needs as many components."
            )
        missed = found - wanted
        error = missed.norm() / batch.values.norm() if batch.relative else missed.square().mean().sqrt()
        return Evaluation(float(error), None, len(batch.points))

    def surfaces(self) -> tuple[Surface, Surface] | None:
        reference = self.heldout
        if isinstance(reference, Points) or reference.shape is None:
            return None
        spans = tuple((float(x.min()), float(x.max())) for x in (reference.points[:, at] for at, _ in reference.axes))
        names = (reference.axes[0][1], reference.axes[1][1])
        both = (reference.values, self._values(reference))
        shown = (values[:, 0].reshape(reference.shape).tolist() for values in both)
        solution, found = (Surface(values, (spans[0], spans[1]), names) for values in shown)
        return solution, found

    def _values(self, reference: Reference) -> Tensor:
        """The network at the points of the reference, float64, on the CPU."""
        with self.evaluating(), in_parts_of(self.task):
            chunks = reference.points.to(self.device, self.dtype).split(8192)
            return torch.cat([self.model(x) for x in chunks]).double().cpu()


@dataclass(frozen=True)
class PhysicsTask(Task):
    """A named recipe for a `PhysicsProblem`.

    Args:
        name, title, description: as for every task.
        network: makes the network, drawing initial weights from the global generator.
        conditions: what it is to satisfy.
        reference: makes the solution to compare with; None where it is not known.
        redrawn: whether every step has points of its own. Fixed points can be fitted by networks that are wrong between
            them (docs/residual-space.md).
        first, last: points of the first steps, and at most of later ones, as for the problem, for optimizers whose
            steps tell when more are needed.
        balanced: whether the conditions are to be weighed anew in every step, by optimizers that can: where initial or
            boundary values are learnt too late else (docs/balancing.md).

    Example:
        >>> from imstep import pde
        >>> slope = Condition("equation", lambda u, x: pde.gradient(u, x)[..., 0] - x.cos(),
        ...                   lambda count, generator: 6 * torch.rand(count, 1, generator=generator).double(), 50)
        >>> start = Condition("start", lambda u, x: u(x), lambda count, generator: torch.zeros(count, 1).double(), 1)
        >>> x = torch.linspace(0, 6, 100).double()[:, None]
        >>> network = lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> task = PhysicsTask("sine", "A sine", "u' = cos x", network, (slope, start), lambda: Reference(x, x.sin()))
        >>> problem = task.build(seed=0)
        >>> problem.data
        '51 points redrawn each step (50 equation, 1 start)'
    """

    network: Callable[[], nn.Module]
    conditions: tuple[Condition, ...]
    reference: Callable[[], Reference] | None = None
    redrawn: bool = True
    first: int | None = None
    last: int | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        given = self.conditions
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(c, Condition) for c in given):
            raise TaskError(
                f"conditions of {self.name!r} are a tuple of one Condition or more, (equation, boundary), or "
                f"(equation,) for one; got {given!r}."
            )

    @property
    def has_batches(self) -> bool:
        return False

    @property
    def squares(self) -> bool:
        return True

    def _model(self) -> nn.Module:
        with in_parts_of(self.name):
            return self.network()

    def _problem(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        data: Path | None,
        examples: int | None,
    ) -> PhysicsProblem:
        conditions = self.conditions
        if examples is not None:
            conditions = of_all(conditions, examples)
        with in_parts_of(self.name):
            train, other = (draw(conditions, mix(number, CHECK), device, dtype) for number in (0, 1))
            heldout = other if self.reference is None else self.reference()
        total, own = (sum(c.count for c in of) for of in (conditions, self.conditions))
        first, last = (None if n is None else max(1, n * total // own) for n in (self.first, self.last))
        settings = self.redrawn, first, last, self.balanced
        return PhysicsProblem(self.name, model, conditions, heldout, train, other, dtype, *settings)


def of_all(conditions: Sequence[Condition], count: int) -> tuple[Condition, ...]:
    """Conditions with so many points in all, in the same proportion; each has one at least."""
    share = count / sum(c.count for c in conditions)
    return tuple(replace(c, count=max(1, round(share * c.count))) for c in conditions)


def draw(conditions: Sequence[Condition], seed: int, device: torch.device, dtype: torch.dtype) -> Points:
    """Points for each condition as it draws them, a function of the seed."""
    generator = Generator().manual_seed(seed)
    return Points(tuple(c.draw(c.count, generator).to(device, dtype) for c in conditions))
