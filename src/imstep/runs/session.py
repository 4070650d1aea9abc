"""A run as the user sees it: progress while it goes, a summary at its end, how to resume if interrupted."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imstep.runs.config import RunConfig
from imstep.runs.interrupt import Interrupt
from imstep.runs.progress import TrainingProgress
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer
from imstep.runs.tensorboard import TensorBoardLog, writer_class
from imstep.runs.train import Observer, train

__all__ = ["resume_run", "start_run"]


@dataclass(frozen=True)
class Manner:
    """How a run is shown and saved; none of it changes its numbers.

    Args:
        console: where progress and summary go.
        tensorboard: also write TensorBoard scalars.
        save_every: seconds between checkpoints (> 0).

    Raises:
        TrainingError: `save_every` is not above zero, or TensorBoard is wanted but not installed.
    """

    console: Console
    tensorboard: bool = False
    save_every: float = 30.0

    def __post_init__(self) -> None:
        if not self.save_every > 0:
            raise TrainingError(f"save_every={self.save_every}: give seconds above 0.")
        if self.tensorboard:
            writer_class()


def start_run(config: RunConfig, path: Path, manner: Manner) -> bool:
    """Train from the start in a new run directory.

    Args:
        config: the run.
        path: its directory; must not exist or be empty.
        manner: how it is shown and saved.

    Returns:
        Whether the run reached its end; False if it was interrupted (and saved).

    Raises:
        TaskError, OptimizerError, TrainingError, RunDirectoryError: cannot be started; says why. Nothing is
            written unless all of the run could be built.
    """
    _ = config.limits
    trainer = config.build()
    with RunDirectory.create(path, config) as run:
        return _go(trainer, run, manner)


def resume_run(
    path: Path,
    manner: Manner,
    *,
    epochs: float | None = None,
    budget: float | None = None,
    seconds: float | None = None,
) -> bool:
    """Go on from a run's checkpoint, to the same numbers as if it had never stopped.

    Args:
        path: the run directory.
        manner: how it is shown and saved.
        epochs, budget, seconds: new limits in place of the run's own, if any is given.

    Returns:
        Whether the run reached its end.

    Raises:
        RunDirectoryError, CheckpointError: no run there, or a damaged or foreign checkpoint.
    """
    run = RunDirectory.open(path)
    trainer = run.config.build()
    with run:
        run.restore(trainer)
        run.extend(epochs=epochs, budget=budget, seconds=seconds)
        for difference in run.differences():
            manner.console.print(f"[yellow]note:[/] {escape(difference)}; last digits may differ.")
        return _go(trainer, run, manner)


def _go(trainer: Trainer, run: RunDirectory, manner: Manner) -> bool:
    console, config, first = manner.console, run.config, trainer.totals.steps
    problem = trainer.problem
    batch = "full batch" if config.batch_size is None else f"batches of {config.batch_size}"
    console.print(
        f"[bold]{config.task}[/] by [bold]{config.optimizer}[/]: {problem.size:,} parameters, "
        f"{problem.data}, {batch}, {config.dtype}, "
        f"{config.device}, {config.threads} threads, seed {config.seed}"
        + (f", from step {first}" if first else "")
    )
    with ExitStack() as stack:
        observers: list[Observer] = []
        if manner.tensorboard:
            log = TensorBoardLog(run.path, first)
            stack.callback(log.close)
            observers.append(log)
        progress = stack.enter_context(TrainingProgress(console, config.optimizer, config.limits))
        interrupt = stack.enter_context(
            Interrupt(
                lambda: progress.announce("finishing this step, then saving (Ctrl-C again: stop at once)")
            )
        )
        train(
            trainer, run, observers=[*observers, progress], interrupt=interrupt, save_every=manner.save_every
        )
    _conclude(trainer, run, console)
    if trainer.ending is None:
        flag = " --tensorboard" if manner.tensorboard else ""
        console.print(f"Interrupted after step {trainer.totals.steps}, saved. Resume with:")
        console.print(
            f"  imstep train --resume {shlex.quote(str(run.path))}{flag}", markup=False, soft_wrap=True
        )
    elif trainer.totals.steps == first:
        console.print("There was nothing left to do. Give a higher --epochs or --budget to go on.")
    return trainer.ending is not None


def _conclude(trainer: Trainer, run: RunDirectory, console: Console) -> None:
    """Show what was reached and what it cost, and write the page about it."""
    rows = run.rows()
    facts = _facts(trainer, rows)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in facts.items():
        table.add_row(name, escape(text))
    console.print(table)
    try:
        from imstep.runs.run_report import save_run_report  # matplotlib: slow to import, and an extra
    except ImportError:
        console.print(f"run directory: {run.path}  (for a page with plots: pip install 'imstep[report]')")
        return
    page = save_run_report(run.path, run.config, rows, facts, trainer.problem.surfaces())
    console.print(f"run directory: {run.path}\nreport: {page}", highlight=False, markup=False, soft_wrap=True)


def _facts(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, str]:
    totals, facts = trainer.totals, {"ended": trainer.ending.message if trainer.ending else "interrupted"}
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        at = "" if last["step"] == totals.steps else f"  (at step {last['step']})"
        facts["train loss"] = _number(last["train_loss"]) + at
        facts["held-out loss"] = _number(last["heldout_loss"]) + at
        if trainer.problem.metric is not None:
            values = (_number(last["train_metric"]), _number(last["heldout_metric"]))
            facts[trainer.problem.metric.name] = f"train {values[0]}, held-out {values[1]}{at}"
    facts["steps, epochs"] = f"{totals.steps:,}, {trainer.epoch:g}"
    facts["gradient-equivalents"] = (
        f"{totals.cost:,.1f}  (gradients {totals.gradients}, products {totals.products}, "
        f"losses {totals.losses})"
    )
    facts["seconds"] = f"{totals.seconds:.1f}"
    facts["evaluations"] = (
        f"{totals.evaluations}  (not charged: {totals.evaluation_cost:.1f} gradient-equivalents, "
        f"{totals.evaluation_seconds:.1f} s)"
    )
    if totals.statuses:
        counts = sorted(totals.statuses.items(), key=lambda item: -item[1])
        facts["steps ended by"] = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts)
    return facts


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
