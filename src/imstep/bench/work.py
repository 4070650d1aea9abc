"""One run of the bench, made in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from imstep.bench.averaging import EvaluatedAtAverage, cosine
from imstep.bench.entry import Entry
from imstep.bench.sides import OWN, Options, Side, own_side, side_of
from imstep.runs.config import torch_dtype
from imstep.runs.environment import environment
from imstep.runs.records import finite
from imstep.runs.rows import Clock, EvaluationRow, Limits, Schedule, TrainingError
from imstep.runs.runner import Trainer
from imstep.runs.sources import hashes
from imstep.runs.steppers import AveragedStepper
from imstep.runs.suitability import REFUSALS
from imstep.tasks import DataNotFoundError, find_task, get_task

__all__ = ["FORMAT", "METHOD", "AbsentError", "Apart", "DiedError", "Job", "perform", "run_apart"]

FORMAT = "imstep-bench/1"
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How processes begin: where there is such a thing, from a server that has imported torch and computed nothing."""

AVERAGE = 0.98
"""With mini-batches: over about 50 gradients, as are ten steps of our configuration for them, which averages itself."""
COLUMNS = ("cost", "seconds", "step", "epoch", "train", "heldout", "train_metric", "heldout_metric")
SOLVED = "target reached"

Tell = Callable[[float, float], None]
"""Told how much of a run is done, 0 to 1, and its training loss."""


class AbsentError(RuntimeError):
    """The task's data is not installed; says how to get it."""


class DiedError(RuntimeError):
    """The process of a run ended without a result."""


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Args:
        entry: what is trained.
        side: the contestant's name.
        optimizer: the optimizer's name.
        kind: "trial-00" or "seed-0".
        options: that differ from the optimizer's defaults.
        seed: of initial weights and batches.
        limits: of the run.
    """

    entry: Entry
    side: str
    optimizer: str
    kind: str
    options: Options
    seed: int
    limits: Limits

    @property
    def contestant(self) -> Side:
        """Who runs."""
        return own_side(self.optimizer) if self.side == OWN else side_of(self.side)

    @property
    def trial(self) -> bool:
        """Whether it is one of tuning."""
        return self.kind.startswith("trial")

    @property
    def request(self) -> dict[str, Any]:
        """All that decides the result, JSON-able: an earlier run by the same request need not be made again."""
        entry, side = self.entry, self.contestant
        rules: dict[str, Any] = {"until": entry.level} if entry.until_solved else {}
        if entry.batch_size is not None:
            rules["average"] = AVERAGE
        return {
            "task": entry.task, "side": self.side, "optimizer": self.optimizer,
            "options": {**side.fixed, **self.options}, "cosine": side.cosine, "seed": self.seed,
            "limits": {k: v for k, v in asdict(self.limits).items() if v is not None},
            "batch_size": entry.batch_size, "examples": entry.examples, "dtype": entry.dtype,
            "files": _digests(entry.task), "clock": entry.clock.value, **rules,
        }  # fmt: skip


@cache
def _digests(task: str) -> list[str]:
    """Of the files of a task of one's own: runs by an edited program or table do not compare with earlier ones."""
    return sorted(hashes(find_task(task)).values())


def perform(job: Job, tell: Tell = lambda done, loss: None) -> dict[str, Any]:
    """Train until the limit; the record of the run, JSON-able.

    Raises:
        AbsentError: the data is not there.
        TrainingError: the entry's clock does not fit how the task computes.
    """
    entry, side = job.entry, job.contestant
    about = _about()
    try:
        problem = get_task(entry.task).build(job.seed, dtype=torch_dtype(entry.dtype), examples=entry.examples)
    except DataNotFoundError as error:
        raise AbsentError(str(error)) from error
    points: list[list[float | None]] = []
    trainer, ending = None, ""
    try:
        stepper = side.spec.create(problem, **{**side.fixed, **job.options})
        groups = [(group, group["lr"]) for group in stepper.optimizer.param_groups if "lr" in group]
        if entry.batch_size is not None and not isinstance(stepper, AveragedStepper):
            stepper = EvaluatedAtAverage(stepper, problem.model, AVERAGE)
        looks = entry.looks_of(job.trial)
        trainer = Trainer(
            problem, stepper, batch_size=entry.batch_size, seed=job.seed, schedule=_schedule(job.limits, looks),
            seconds=entry.clock,
        )  # fmt: skip
        for row in trainer.run(job.limits):
            done = _done(trainer, job.limits)
            if isinstance(row, EvaluationRow):
                points.append(_point(row))
                tell(done, row.train_loss)
                if entry.measure.value(dict(zip(COLUMNS, points[-1], strict=True))) <= entry.ending:
                    ending = SOLVED
                    break
            elif side.cosine:
                for group, rate in groups:
                    group["lr"] = rate * cosine(done)
        ending = trainer.ending.message if trainer.ending else ending
    except REFUSALS as error:
        ending = f"refused: {error}"
    except (ArithmeticError, RuntimeError) as error:  # a side that fails within its run has a result, too
        ending = f"failed: {type(error).__name__}: {error}".split("\n")[0]
    totals = None if trainer is None else trainer.totals
    return finite({
        "format": FORMAT, "entry": entry.label, "kind": job.kind, "request": job.request, "ending": ending,
        "columns": COLUMNS, "curve": points, "parameters": problem.size,
        "steps": totals.steps if totals else 0, "products": totals.products if totals else 0,
        "statuses": dict(totals.statuses) if totals else {}, "about": about,
    })  # fmt: skip


def _schedule(limits: Limits, looks: int) -> Schedule:
    if limits.seconds is not None:
        return Schedule(limits.seconds / looks, Clock.SECONDS)
    return Schedule((limits.budget or 1.0) / looks, Clock.COST)


def _done(trainer: Trainer, limits: Limits) -> float:
    used = trainer.totals.cost if limits.seconds is None else trainer.totals.seconds
    return used / (limits.seconds or limits.budget or 1.0)


def _point(row: EvaluationRow) -> list[float | None]:
    values = (
        row.cost, row.seconds, row.step, row.epoch, row.train_loss, row.heldout_loss, row.train_metric,
        row.heldout_metric,
    )  # fmt: skip
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]


def _about() -> dict[str, str]:
    """When and on what a run is made."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **environment(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "load average": f"{os.getloadavg()[0]:.1f}",
    }


_ERRORS: dict[str, type[Exception]] = {"absent": AbsentError, "unfit": TrainingError}
"""What a process may end with in place of a record."""


def _child(pipe: Connection, job: Job) -> None:
    """What the process does."""
    # Ctrl-C is for the parent, which ends this process if it must.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        pipe.send(("done", perform(job, lambda done, loss: pipe.send(("at", done, loss)))))
    except tuple(_ERRORS.values()) as error:
        pipe.send((next(name for name, kind in _ERRORS.items() if isinstance(error, kind)), str(error)))


@dataclass(frozen=True)
class Apart:
    """A run that is being made.

    Args:
        job: the run.
        pipe: what is told of it: ("at", done, loss) now and then; in the end ("done", record), or an error's name and
            message.
        process: who makes it, if it is to be waited for.
    """

    job: Job
    pipe: Connection
    process: BaseProcess | None = None

    def hear(self, tell: Tell) -> dict[str, Any] | None:
        """Wait for what is told next: the record if the run is finished, else None.

        Raises:
            AbsentError: the data is not there.
            TrainingError: the run cannot be made.
            DiedError: the process ended without a result.
        """
        try:
            kind, *told = self.pipe.recv()
        except EOFError:
            code = self._ended()
            raise DiedError(f"the process ended without a result (exit code {code})") from None
        if kind == "at":
            tell(*told)
            return None
        self._ended()
        if kind in _ERRORS:
            raise _ERRORS[kind](*told)
        (record,) = told
        return dict(record)

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None:
            self.process.kill()
        self._ended()

    def _ended(self) -> int | None:
        """Wait for the process; its exit code."""
        self.pipe.close()
        if self.process is None:
            return None
        self.process.join()
        return self.process.exitcode


def run_apart(job: Job) -> Apart:
    """Begin a run, as `perform` makes it, in a process of its own with one thread."""
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        multiprocessing.set_forkserver_preload(["imstep.bench.preload"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, job), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return Apart(job, ours, process)
