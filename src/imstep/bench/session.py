"""A run as the user sees it: progress while it goes, a summary at its end, how to resume if interrupted."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imstep.bench.config import RunConfig
from imstep.bench.interrupt import Interrupt
from imstep.bench.progress import TrainingProgress
from imstep.bench.rundir import RunDirectory
from imstep.bench.runner import Trainer
from imstep.bench.tensorboard import TensorBoardLog, writer_class
from imstep.bench.train import Observer, train

__all__ = ["resume_run", "start_run"]


def start_run(
    config: RunConfig, path: Path, console: Console, *, tensorboard: bool = False, save_every: float = 30.0
) -> bool:
    """Train from the start in a new run directory.

    Args:
        config: the run.
        path: its directory; must not exist or be empty.
        console: where progress and summary go.
        tensorboard: also write TensorBoard scalars.
        save_every: seconds between checkpoints.

    Returns:
        Whether the run reached its end; False if it was interrupted (and saved).

    Raises:
        TaskError, OptimizerError, TrainingError, RunDirectoryError: cannot be started; says why. Nothing is
            written unless all of the run could be built.
    """
    _ = config.limits
    if tensorboard:
        writer_class()
    trainer = config.build()
    with RunDirectory.create(path, config) as run:
        return _go(trainer, run, console, tensorboard, save_every)


def resume_run(
    path: Path,
    console: Console,
    *,
    epochs: float | None = None,
    budget: float | None = None,
    seconds: float | None = None,
    tensorboard: bool = False,
    save_every: float = 30.0,
) -> bool:
    """Go on from a run's checkpoint, to the same numbers as if it had never stopped.

    Args:
        path: the run directory.
        epochs, budget, seconds: new limits in place of the run's own, if any is given.

    Returns, and further arguments: as `start_run`.

    Raises:
        RunDirectoryError, CheckpointError: no run there, or a damaged or foreign checkpoint.
    """
    run = RunDirectory.open(path)
    trainer = run.config.build()
    with run:
        run.restore(trainer)
        run.extend(epochs=epochs, budget=budget, seconds=seconds)
        for difference in run.differences():
            console.print(
                f"[yellow]note:[/] {escape(difference)}; the numbers may differ in their last digits."
            )
        return _go(trainer, run, console, tensorboard, save_every)


def _go(trainer: Trainer, run: RunDirectory, console: Console, tensorboard: bool, save_every: float) -> bool:
    config, first = run.config, trainer.totals.steps
    problem = trainer.problem
    batch = "full batch" if config.batch_size is None else f"batches of {config.batch_size}"
    console.print(
        f"[bold]{config.task}[/] by [bold]{config.optimizer}[/]: {problem.size:,} parameters, "
        f"{len(problem.train):,} examples ({len(problem.heldout):,} held out), {batch}, {config.dtype}, "
        f"{config.device}, {config.threads} threads, seed {config.seed}"
        + (f", from step {first}" if first else "")
    )
    with ExitStack() as stack:
        observers: list[Observer] = []
        if tensorboard:
            log = TensorBoardLog(run.path, first)
            stack.callback(log.close)
            observers.append(log)
        progress = stack.enter_context(TrainingProgress(console, config.optimizer, config.limits))
        interrupt = stack.enter_context(
            Interrupt(
                lambda: progress.announce("finishing this step, then saving (Ctrl-C again: stop at once)")
            )
        )
        train(trainer, run, observers=[*observers, progress], interrupt=interrupt, save_every=save_every)
    _summarise(trainer, run, console)
    if trainer.ending is None:
        flag = " --tensorboard" if tensorboard else ""
        console.print(f"Interrupted after step {trainer.totals.steps}, saved. Resume with:")
        console.print(
            f"  imstep train --resume {shlex.quote(str(run.path))}{flag}", markup=False, soft_wrap=True
        )
    elif trainer.totals.steps == first:
        console.print("There was nothing left to do. Give a higher --epochs or --budget to go on.")
    return trainer.ending is not None


def _summarise(trainer: Trainer, run: RunDirectory, console: Console) -> None:
    """A table of what was reached and what it cost."""
    totals = trainer.totals
    evaluations = [row for row in run.rows() if row["kind"] == "evaluation"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("ended", trainer.ending.message if trainer.ending else "interrupted")
    if evaluations:
        last = evaluations[-1]
        at = "" if last["step"] == totals.steps else f"  (at step {last['step']})"
        table.add_row("train loss", _number(last["train_loss"]) + at)
        table.add_row("held-out loss", _number(last["heldout_loss"]) + at)
        if trainer.problem.metric is not None:
            values = (_number(last["train_metric"]), _number(last["heldout_metric"]))
            table.add_row(trainer.problem.metric.name, f"train {values[0]}, held-out {values[1]}{at}")
    table.add_row("steps, epochs", f"{totals.steps}, {trainer.epoch:g}")
    table.add_row(
        "gradient-equivalents",
        f"{totals.cost:.1f}  (gradients {totals.gradients}, products {totals.products}, "
        f"losses {totals.losses})",
    )
    table.add_row("seconds", f"{totals.seconds:.1f}")
    table.add_row(
        "evaluations",
        f"{totals.evaluations}  (not charged: {totals.evaluation_cost:.1f} gradient-equivalents, "
        f"{totals.evaluation_seconds:.1f} s)",
    )
    if totals.statuses:
        counts = sorted(totals.statuses.items(), key=lambda item: -item[1])
        table.add_row("statuses", ", ".join(f"{name} {count}" for name, count in counts))
    table.add_row("run directory", escape(str(run.path)))
    console.print(table)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
