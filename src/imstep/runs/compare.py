"""Several optimizers on one task: the same data, the same initial weights, the same budget of gradients.

Baselines with a learning rate are tuned: every rate of a small grid gets the *full* budget, and the best
one is shown. The first contestant is the subject of the verdict and is not tuned.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from imstep.runs.config import set_threads, torch_dtype
from imstep.runs.contestants import Contestant, contestants
from imstep.runs.environment import environment
from imstep.runs.records import Comparison, Point, Run, Sweep, SweepRow
from imstep.runs.rows import Clock, Ending, EvaluationRow, Limits, Schedule, StepRow, TrainingError
from imstep.runs.runner import Trainer
from imstep.runs.suitability import rehearse
from imstep.runs.verdict import judge
from imstep.tasks import Problem, Surface, Task, get_task

__all__ = ["DEFAULT_BUDGET", "Listener", "Silent", "compare"]

DEFAULT_BUDGET = 600.0
"""Gradient-equivalents a run; the demo with its sweeps then takes about a minute on two cores."""
EVALUATIONS = 150
PICTURES = 12


class Listener(Protocol):
    """Is told how a comparison goes; draws it, or does not."""

    def begin(self, names: Sequence[str], settings: Sequence[int], budget: float) -> None:
        """Called once: who runs, how many settings each will try, and the gradient-equivalents for each setting."""

    def candidate(self, index: int, number: int, words: str) -> None:
        """Contestant `index` starts with its setting `number`, from 0; `words` tell it, or are empty."""

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None:
        """Contestant `index` has spent `cost` on this setting and has the training loss `loss`."""

    def end(self, index: int, run: Run) -> None:
        """Contestant `index` is done; `run` is its best."""


class Silent:
    """A listener that draws nothing."""

    def begin(self, names: Sequence[str], settings: Sequence[int], budget: float) -> None: ...

    def candidate(self, index: int, number: int, words: str) -> None: ...

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None: ...

    def end(self, index: int, run: Run) -> None: ...


@dataclass(frozen=True)
class _Setting:
    """What all runs of a comparison share."""

    build: Callable[[], Problem]
    budget: float
    seed: int


def compare(
    task: str | Task,
    rivals: Sequence[Contestant] | None = None,
    *,
    budget: float = DEFAULT_BUDGET,
    seed: int = 0,
    threads: int | None = None,
    data: Path | str | None = None,
    examples: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    command: str = "",
    sources: Mapping[str, str] | None = None,
    listener: Listener | None = None,
    earlier: Comparison | None = None,
    keep: Callable[[Comparison], None] = lambda comparison: None,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Run every contestant from the same initial weights within the same budget.

    Args:
        task: a task or the name of one.
        rivals: the contestants, the subject first; None for `contestants()`.
        budget: gradient-equivalents of the full training set each setting may spend (> 0).
        seed: decides initial weights and the order of mini-batches.
        threads: CPU threads of torch (>= 1); None leaves them as they are.
        data: folder of the data set, or None.
        examples: train on the first so many examples, or None for all.
        device: where to train.
        dtype: "float32" or "float64".
        command: what the report shows as the way to repeat this.
        sources: files of the task and their hashes, to be shown with the versions.
        listener: is told about progress.
        earlier: an unfinished comparison by the same arguments, to go on with.
        keep: called with the comparison so far whenever a setting is done.
        stop: asked after every step whether to end early, without the setting that is being tried.

    Returns:
        The comparison; unfinished, with contestants `waiting`, if it was stopped.

    Raises:
        TaskError, OptimizerError, TrainingError, NoResidualsError: a setting that cannot be, or an optimizer that
            refuses the task; the message says why. Nothing has been run then.
    """
    rivals = list(contestants() if rivals is None else rivals)
    if not rivals:
        raise TrainingError("a comparison needs at least one optimizer.")
    if threads is not None:
        set_threads(threads)
    Limits(budget=budget)
    recipe, told = get_task(task) if isinstance(task, str) else task, listener or Silent()
    kind = torch_dtype(dtype)
    setting = _Setting(
        lambda: recipe.build(seed, data=data, examples=examples, device=device, dtype=kind), float(budget), seed
    )
    problem = setting.build()
    rivals = [rival for rival in rivals if not _repeats(rival, rivals, problem)]
    for contestant in rivals if earlier is None else ():
        rehearse(contestant.spec, problem, contestant.batch_size, contestant.candidates()[0])
    start = time.perf_counter()
    told.begin([c.name for c in rivals], [len(c.candidates()) for c in rivals], setting.budget)
    found = earlier or Comparison(
        task=recipe.name,
        title=recipe.title,
        description=recipe.description,
        parameters=problem.size,
        seed=seed,
        budget=setting.budget,
        batch_size=rivals[0].batch_size,
        runs=(),
        sweeps=(),
        environment={**environment(), **(sources or {})},
        command=command,
        seconds=0.0,
        verdict=judge((), setting.budget),
        originals=problem.pictures(PICTURES)[0],
        solution=_surface(problem, 0),
        waiting=tuple(c.title for c in rivals),
    )
    before = found.seconds
    for index, run in enumerate(found.runs):
        told.end(index, run)
    for index, contestant in list(enumerate(rivals))[len(found.runs) :]:
        candidates = contestant.candidates()
        for options in candidates[len(found.tried) :]:
            told.candidate(index, len(found.tried), f"lr {options['lr']:g}" if contestant.learning_rates else "")
            tried = _run(contestant, options, setting, partial(told.advance, index), stop)
            if tried is None:
                return found
            seconds = before + time.perf_counter() - start
            found = replace(found, tried=(*found.tried, tried), seconds=seconds)
            if len(found.tried) == len(candidates):
                found = _chosen(found, contestant)
                told.end(index, found.runs[-1])
            keep(found)
    return found


def _repeats(rival: Contestant, rivals: Sequence[Contestant], problem: Problem) -> bool:
    """Whether a contestant's mini-batches hold all of the data, so that another is the same by the full batch."""
    whole = rival.batch_size is not None and problem.batch_count(rival.batch_size) == 1
    return whole and any(other == replace(rival, batch_size=None) for other in rivals)


def _chosen(found: Comparison, contestant: Contestant) -> Comparison:
    """With the contestant's best run by lowest training loss, and the table of all if there were several."""
    # A run without a finite loss has its start as its best point, so it cannot displace one that learned.
    best = min(found.tried, key=lambda run: run.best.train)
    rows = tuple(
        SweepRow(dict(options), run.best.train, run.final.seconds, run.note)
        for options, run in zip(contestant.candidates(), found.tried, strict=True)
    )
    sweeps = (Sweep(contestant.title, found.budget, rows),) if len(rows) > 1 else ()
    runs, waiting = (*found.runs, best), found.waiting[1:]
    return replace(
        found,
        runs=runs,
        sweeps=(*found.sweeps, *sweeps),
        verdict=judge(runs, found.budget, waiting),
        tried=(),
        waiting=waiting,
    )


def _run(
    contestant: Contestant,
    options: dict[str, float],
    setting: _Setting,
    advance: Callable[[float, float, float], None],
    stop: Callable[[], bool],
) -> Run | None:
    """Train a fresh copy of the problem until the budget is spent; None if stopped before."""
    problem = setting.build()
    trainer = Trainer(
        problem,
        contestant.spec.create(problem, **options),
        batch_size=contestant.batch_size,
        seed=setting.seed,
        schedule=Schedule(setting.budget / EVALUATIONS, Clock.COST),
    )
    points, steps = _follow(trainer, setting.budget, advance, stop)
    ending = trainer.ending
    if ending is None:
        return None
    return Run(
        optimizer=contestant.spec.name,
        label=contestant.label(options),
        options={**contestant.spec.resolve(options), "batch_size": contestant.batch_size},
        points=tuple(points),
        products=sum(int(step.record.get("products", 0)) for step in steps if step.record),
        statuses=dict(Counter(status for status in map(_status, steps) if status)),
        note="" if ending is Ending.BUDGET else ending.message,
        anatomy=tuple({**step.record, "cost": step.cost} for step in steps if step.record),
        pictures=problem.pictures(PICTURES)[1],
        surface=_surface(problem, 1),
    )


def _surface(problem: Problem, at: int) -> Surface | None:
    """The solution (0) or the model (1)."""
    surfaces = problem.surfaces()
    return None if surfaces is None else surfaces[at]


def _follow(
    trainer: Trainer, budget: float, advance: Callable[[float, float, float], None], stop: Callable[[], bool]
) -> tuple[list[Point], list[StepRow]]:
    """Evaluations and steps within the budget: what a last step reached by overshooting does not count."""
    points: list[Point] = []
    steps: list[StepRow] = []
    for row in trainer.run(Limits(budget=budget)):
        if stop():
            break
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

