"""A run as the user sees it: progress while it goes, a summary at its end, how to resume if interrupted."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imstep.curvature import NoResidualsError
from imstep.curvature.processes import OtherProcessError
from imstep.runs.config import RunConfig
from imstep.runs.interrupt import Interrupt
from imstep.runs.kept import Keeper
from imstep.runs.peers import ALONE, Peers
from imstep.runs.progress import LastStep, TrainingProgress
from imstep.runs.rows import Ending, TrainingError
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer
from imstep.runs.sources import origin_of
from imstep.runs.steppers import RefusedError
from imstep.runs.suitability import suited
from imstep.runs.tensorboard import TensorBoardLog, writer_class
from imstep.runs.train import Observer, train
from imstep.runs.watch import CurvatureWatch
from imstep.tasks import Origin, Task

__all__ = ["Manner", "resume_run", "start_run"]


@dataclass(frozen=True)
class Manner:
    """How a run is shown and saved; none of it changes its numbers.

    Args:
        console: where progress and summary go.
        tensorboard: also write TensorBoard scalars.
        save_every: seconds between checkpoints (> 0).
        watch: measures the curvature now and then; None for not at all.
        keep: steps between weights that are kept; None to keep the last only.

    Raises:
        TrainingError: `save_every` is not above zero, or TensorBoard is wanted but not installed.
    """

    console: Console
    tensorboard: bool = False
    save_every: float = 30.0
    watch: CurvatureWatch | None = None
    keep: int | None = None

    @property
    def flags(self) -> str:
        """The options of the command line that say the same."""
        flags = " --tensorboard" if self.tensorboard else ""
        flags += f" --watch-curvature every={self.watch.every}" if self.watch is not None else ""
        return flags + (f" --keep every={self.keep}" if self.keep is not None else "")

    def __post_init__(self) -> None:
        if not self.save_every > 0:
            raise TrainingError(f"save_every={self.save_every}: give seconds above 0.")
        if self.tensorboard:
            writer_class()


def start_run(
    config: RunConfig, path: Path, manner: Manner, origin: Origin | None = None, peers: Peers = ALONE
) -> bool:
    """Train from the start in a new run directory.

    Args:
        config: the run.
        path: its directory; must not exist or be empty.
        manner: how it is shown and saved.
        origin: its task, where it has been looked up already.
        peers: the processes that train together, all of which call this.

    Returns:
        Whether the run reached its end; False if it was interrupted (and saved).

    Raises:
        TaskError, OptimizerError, TrainingError, RunDirectoryError, NoResidualsError: cannot be started; says why.
            Nothing is written unless all of the run could be built and its first step made.
        OtherProcessError: another process cannot start.
    """

    def planned() -> tuple[Task, Trainer, RunDirectory]:
        _ = config.limits
        found = origin or config.origin()
        trainer = config.build(found.task, peers)
        if not peers.first:
            return found.task, trainer, RunDirectory(path, config, {}, writes=False)
        return found.task, trainer, RunDirectory.planned(path, config, found)

    task, trainer, run = peers.together(planned)
    with run:
        try:
            return _go(trainer, run, task, manner)
        except (NoResidualsError, RefusedError) as error:
            others = ", ".join(name for name in suited(task) if name != config.optimizer)
            reason = f"{config.optimizer} does not suit {task.name}: {error} Others: {others}."
            raise (type(error) if peers.first else OtherProcessError)(reason) from error


def resume_run(
    path: Path,
    manner: Manner,
    *,
    epochs: float | None = None,
    budget: float | None = None,
    seconds: float | None = None,
    peers: Peers = ALONE,
) -> bool:
    """Go on from a run's checkpoint, to the same numbers as if it had never stopped.

    Args:
        path: the run directory.
        manner: how it is shown and saved.
        epochs, budget, seconds: new limits in place of the run's own, if any is given.
        peers: the processes that train together, all of which call this, and can read the directory. They may be more
            or fewer than before.

    Returns:
        Whether the run reached its end.

    Raises:
        RunDirectoryError, CheckpointError: no run there, or a damaged or foreign checkpoint.
        TaskError, TrainingError: a file of the task's is gone or has changed.
    """

    def restored() -> tuple[Task, Trainer, RunDirectory]:
        run = RunDirectory.open(path, writes=peers.first)
        origin, notes = origin_of(run.config, path)
        trainer = run.config.build(origin.task, peers)
        run.restore(trainer)
        run.extend(epochs=epochs, budget=budget, seconds=seconds)
        notes += [f"{difference}; last digits may differ." for difference in run.differences()]
        for note in notes:
            manner.console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
        return origin.task, trainer, run

    task, trainer, run = peers.together(restored)
    with run:
        return _go(trainer, run, task, manner)


def _go(trainer: Trainer, run: RunDirectory, task: Task, manner: Manner) -> bool:
    console, first, alone = manner.console, trainer.totals.steps, trainer.peers.size == 1
    _introduce(trainer, run, task, console)
    last = LastStep()
    try:
        with ExitStack() as stack:
            observers: list[Observer] = [last]
            if manner.tensorboard and run.writes:
                log = TensorBoardLog(run.path, first)
                stack.callback(log.close)
                observers.append(log)
            if manner.keep is not None and run.writes:
                observers.append(Keeper(run, manner.keep))
            progress = stack.enter_context(TrainingProgress(console, run.config.optimizer, run.config.limits))
            interrupt = stack.enter_context(
                Interrupt(
                    lambda: progress.announce(
                        f"finishing this step, then saving{' (Ctrl-C again: stop at once)' if alone else ''}"
                    ),
                    at_once=alone,
                )
            )
            train(
                trainer, run, observers=[*observers, progress], interrupt=interrupt, save_every=manner.save_every,
                watch=manner.watch if run.writes else None,
            )  # fmt: skip
    except KeyboardInterrupt:
        _stopped_at_once(run, last, manner, trainer.peers)
        return False
    if run.writes:
        _conclude(trainer, run, task, last, console)
    if trainer.ending is None:
        console.print("Interrupted and saved. Go on with:")
        _print_command(f"{_resuming(run, trainer.peers)}{manner.flags}", console)
    elif trainer.totals.steps == first:
        longer = trainer.ending not in (Ending.CONVERGED, Ending.DIVERGED)
        more = " Give a higher --epochs or --budget to go on." if longer else ""
        console.print(f"There was nothing left to do.{more}")
    return trainer.ending is not None


def _introduce(trainer: Trainer, run: RunDirectory, task: Task, console: Console) -> None:
    """Say what is trained, and what one should know of its data."""
    problem, config = trainer.problem, run.config
    batch = "full batch" if config.batch_size is None else f"batches of {config.batch_size}"
    first = trainer.totals.steps
    console.print(
        f"[bold]{escape(task.name)}[/] by [bold]{escape(config.optimizer)}[/]: {problem.size:,} parameters, "
        f"{problem.data}, {batch}, {config.dtype}, {config.device}, {config.threads} threads, seed {config.seed}"
        + ("" if trainer.peers.size == 1 else f", {trainer.peers.size} processes")
        + (f", from step {first}" if first else "")
    )
    for note in task.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


def _stopped_at_once(run: RunDirectory, last: LastStep, manner: Manner, peers: Peers) -> None:
    console = manner.console
    console.print(f"Stopped at once. {last.describe()}.", markup=False)
    if run.saved_step is None:
        console.print("Nothing was saved: the first step had not ended.")
        return
    console.print(f"Saved is step {run.saved_step:,}; later ones will be made again. Go on with:")
    _print_command(f"{_resuming(run, peers)}{manner.flags}", console)


def _resuming(run: RunDirectory, peers: Peers) -> str:
    here = os.environ.get("LOCAL_WORLD_SIZE", peers.size)
    start = "imstep" if peers.size == 1 else f"torchrun --nproc-per-node {here} -m imstep"
    return f"{start} train --resume {shlex.quote(str(run.path))}"


def _print_command(words: str, console: Console) -> None:
    console.print(f"  {words}", markup=False, soft_wrap=True, highlight=False)


def _conclude(trainer: Trainer, run: RunDirectory, task: Task, last: LastStep, console: Console) -> None:
    """Show what was reached and what it cost, and write the page about it."""
    rows = run.rows()
    facts = _facts(trainer, rows, last)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in facts.items():
        table.add_row(name, escape(text))
    console.print(table)
    try:
        from imstep.runs.run_report import save_run_report  # matplotlib: slow to import, and an extra
    except ImportError:
        console.print(f"run directory: {run.path}  (for a page with plots: pip install 'imstep[report]')")
        return
    page = save_run_report(run.path, run.config, task, rows, facts, trainer.problem.surfaces())
    console.print(f"run directory: {run.path}\nreport: {page}", highlight=False, markup=False, soft_wrap=True)


def _facts(trainer: Trainer, rows: list[dict[str, Any]], recent: LastStep) -> dict[str, str]:
    totals, facts = trainer.totals, {"ended": trainer.ending.message if trainer.ending else "interrupted"}
    if trainer.ending is None:
        facts["last did"] = recent.describe()
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
