"""Several optimizers on one task: the same data, the same initial weights, the same budget of gradients.

Baselines with a learning rate are tuned: every rate of a small grid gets the *full* budget, and the best
one is shown. The first contestant is the subject of the verdict and is not tuned.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from imstep.bench.environment import environment
from imstep.bench.optimizers import OptimizerSpec, get_optimizer
from imstep.bench.records import Comparison, Point, Run, Sweep, SweepRow
from imstep.bench.rows import Clock, Ending, EvaluationRow, Limits, Schedule, StepRow, TrainingError
from imstep.bench.runner import Trainer
from imstep.bench.verdict import judge
from imstep.tasks import Problem, get_task

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_OPTIMIZERS",
    "Contestant",
    "Listener",
    "Silent",
    "compare",
    "contestants",
]

DEFAULT_OPTIMIZERS = ("newton-krylov", "adam", "lbfgs")
DEFAULT_BUDGET = 600.0
"""Gradient-equivalents a run; the demo with its sweeps then takes about a minute on two cores."""
EVALUATIONS = 150
PICTURES = 12


@dataclass(frozen=True)
class Contestant:
    """An optimizer in a comparison.

    Args:
        spec: the optimizer.
        batch_size: examples a step; None for the full batch.
        options: what differs from the optimizer's defaults.
        learning_rates: rates to choose from by a sweep; empty to take the options as they are.

    Raises:
        TrainingError: learning rates for an optimizer that has none.
    """

    spec: OptimizerSpec
    batch_size: int | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.learning_rates and "lr" not in self.spec.defaults:
            raise TrainingError(f"{self.spec.name} has no learning rate to sweep: leave learning_rates out.")

    @property
    def title(self) -> str:
        """For tables: the optimizer, and the batch size if it is not the full batch."""
        return self.spec.title if self.batch_size is None else f"{self.spec.title}, batch {self.batch_size}"

    def candidates(self) -> list[dict[str, float]]:
        """The settings to try, at least one."""
        return [{**self.options, "lr": rate} for rate in self.learning_rates] or [dict(self.options)]

    def label(self, options: Mapping[str, Any]) -> str:
        """The title with the learning rate, where that was chosen by a sweep."""
        return f"{self.title}, lr {options['lr']:g}" if self.learning_rates else self.title


def contestants(
    names: Sequence[str] = DEFAULT_OPTIMIZERS, *, batch_size: int | None = None, minibatch: int | None = 150
) -> list[Contestant]:
    """Contestants by name, the subject first; rates to sweep are each optimizer's own.

    Args:
        names: registered optimizers.
        batch_size: examples a step for all; None for the full batch.
        minibatch: with the full batch for all, optimizers with rates to sweep run a second time with so many
            examples a step: their usual use, and better per gradient-equivalent. None leaves that out.

    Raises:
        OptimizerError: an unknown name.
        TrainingError: no name, or one given twice.
    """
    if not names:
        raise TrainingError("a comparison needs at least one optimizer.")
    if len(set(names)) != len(names):
        raise TrainingError(f"an optimizer is named twice in {', '.join(names)}: name each once.")
    found = []
    for name in names:
        spec = get_optimizer(name)
        found.append(Contestant(spec, batch_size, learning_rates=tuple(spec.learning_rates)))
        if batch_size is None and minibatch is not None and spec.learning_rates:
            found.append(Contestant(spec, minibatch, learning_rates=tuple(spec.learning_rates)))
    return found


class Listener(Protocol):
    """Is told how a comparison goes; draws it, or does not."""

    def begin(self, titles: Sequence[str], budgets: Sequence[float]) -> None:
        """Called once: who runs, and how many gradient-equivalents each will spend, sweeps included."""

    def candidate(self, index: int, label: str) -> None:
        """Contestant `index` starts with one setting."""

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None:
        """Contestant `index` has spent `cost` on this setting and has the training loss `loss`."""

    def end(self, index: int, run: Run) -> None:
        """Contestant `index` is done; `run` is its best."""


class Silent:
    """A listener that draws nothing."""

    def begin(self, titles: Sequence[str], budgets: Sequence[float]) -> None: ...

    def candidate(self, index: int, label: str) -> None: ...

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None: ...

    def end(self, index: int, run: Run) -> None: ...


@dataclass(frozen=True)
class _Setting:
    """What all runs of a comparison share."""

    build: Callable[[], Problem]
    budget: float
    seed: int


def compare(
    task: str,
    rivals: Sequence[Contestant] | None = None,
    *,
    budget: float = DEFAULT_BUDGET,
    seed: int = 0,
    threads: int | None = None,
    data: Path | str | None = None,
    examples: int | None = None,
    device: str = "cpu",
    command: str = "",
    listener: Listener | None = None,
) -> Comparison:
    """Run every contestant from the same initial weights within the same budget.

    Args:
        task: name of a task.
        rivals: the contestants, the subject first; None for `contestants()`.
        budget: gradient-equivalents of the full training set each setting may spend (> 0).
        seed: decides initial weights and the order of mini-batches.
        threads: CPU threads of torch (>= 1); None leaves them as they are.
        data: folder of the data set, or None.
        examples: train on the first so many examples, or None for all.
        device: where to train.
        command: what the report shows as the way to repeat this.
        listener: is told about progress.

    Raises:
        TaskError, OptimizerError, TrainingError: a setting that cannot be; the message says why.
    """
    rivals = list(contestants() if rivals is None else rivals)
    if not rivals:
        raise TrainingError("a comparison needs at least one optimizer.")
    if threads is not None:
        if threads < 1:
            raise TrainingError(f"threads={threads}: give at least one.")
        torch.set_num_threads(threads)
    Limits(budget=budget)
    recipe, told = get_task(task), listener or Silent()
    setting = _Setting(
        lambda: recipe.build(seed, data=data, examples=examples, device=device), float(budget), seed
    )
    problem, start = setting.build(), time.perf_counter()
    told.begin([c.title for c in rivals], [setting.budget * len(c.candidates()) for c in rivals])
    runs, sweeps = [], []
    for index, contestant in enumerate(rivals):
        run, sweep = _best_of(index, contestant, setting, told)
        runs.append(run)
        sweeps += [sweep] if sweep else []
        told.end(index, run)
    return Comparison(
        task=recipe.name,
        title=recipe.title,
        description=recipe.description,
        parameters=problem.size,
        seed=seed,
        budget=setting.budget,
        batch_size=rivals[0].batch_size,
        runs=tuple(runs),
        sweeps=tuple(sweeps),
        environment=environment(),
        command=command,
        seconds=time.perf_counter() - start,
        verdict=judge(runs, setting.budget),
        originals=_pictures(problem, problem.heldout.targets[:PICTURES]),
    )


def _best_of(
    index: int, contestant: Contestant, setting: _Setting, told: Listener
) -> tuple[Run, Sweep | None]:
    """The contestant's best candidate by lowest training loss, and the table of all if there were several."""
    best: Run | None = None
    rows = []
    for options in contestant.candidates():
        told.candidate(index, contestant.label(options))
        run = _run(contestant, options, setting, lambda c, f, s: told.advance(index, c, f, s))
        rows.append(SweepRow(dict(options), run.best.train, run.final.seconds, run.note))
        # A run without a finite loss has its start as its best point, so it cannot displace one that learned.
        if best is None or run.best.train < best.best.train:
            best = run
    if best is None:
        raise TrainingError(f"{contestant.title} has no setting to try.")
    sweep = Sweep(contestant.title, setting.budget, tuple(rows)) if len(rows) > 1 else None
    return best, sweep


def _run(
    contestant: Contestant,
    options: dict[str, float],
    setting: _Setting,
    advance: Callable[[float, float, float], None],
) -> Run:
    """Train a fresh copy of the problem until the budget is spent."""
    problem = setting.build()
    trainer = Trainer(
        problem,
        contestant.spec.create(problem, **options),
        batch_size=contestant.batch_size,
        seed=setting.seed,
        schedule=Schedule(setting.budget / EVALUATIONS, Clock.COST),
    )
    points, steps = _follow(trainer, setting.budget, advance)
    ending = trainer.ending
    return Run(
        optimizer=contestant.spec.name,
        label=contestant.label(options),
        options={**contestant.spec.resolve(options), "batch_size": contestant.batch_size},
        points=tuple(points),
        products=sum(int(step.record.get("products", 0)) for step in steps if step.record),
        statuses=dict(Counter(status for status in map(_status, steps) if status)),
        note="" if ending in (None, Ending.BUDGET) else ending.message,
        anatomy=tuple({**step.record, "cost": step.cost} for step in steps if step.record),
        pictures=_reconstructions(problem),
    )


def _follow(
    trainer: Trainer, budget: float, advance: Callable[[float, float, float], None]
) -> tuple[list[Point], list[StepRow]]:
    """Evaluations and steps within the budget: what a last step reached by overshooting does not count."""
    points: list[Point] = []
    steps: list[StepRow] = []
    for row in trainer.run(Limits(budget=budget)):
        if row.cost > budget * (1 + 1e-9):
            continue
        if isinstance(row, EvaluationRow):
            points.append(Point(row.cost, row.seconds, row.step, row.epoch, row.train_loss, row.heldout_loss))
            advance(row.cost, row.train_loss, row.seconds)
        else:
            steps.append(row)
    return points, steps


def _status(step: StepRow) -> str | None:
    """How the inner solve ended if the optimizer records one, else how the step did."""
    solved = step.record.get("status") if step.record else None
    return str(solved) if solved else step.status


def _reconstructions(problem: Problem) -> tuple[Any, ...]:
    """The model's outputs for the first held-out examples, if outputs are pictures like the targets."""
    problem.model.eval()
    with torch.no_grad():
        outputs = problem.model(problem.heldout.inputs[:PICTURES])
    return _pictures(problem, outputs)


def _pictures(problem: Problem, values: torch.Tensor) -> tuple[Any, ...]:
    """(k, height * width) in [0, 1] as nested lists (k, height, width) of 0 to 255; () for other problems."""
    shape = problem.image_shape
    targets = problem.heldout.targets
    if shape is None or not targets.is_floating_point() or targets[0].numel() != shape[0] * shape[1]:
        return ()
    scaled = (values.detach().float().cpu() * 255).round().clamp(0, 255).nan_to_num(0.0)
    return tuple(scaled.reshape(-1, *shape).to(torch.int64).tolist())
