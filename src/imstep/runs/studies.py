"""Comparisons and the accuracy sweep as the user sees them: progress, files, a table, the verdict."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from imstep.runs.accuracy import measure_accuracy
from imstep.runs.compare import DEFAULT_BUDGET, compare
from imstep.runs.contestants import DEFAULT_OPTIMIZERS, MINIBATCH, contestants
from imstep.runs.files import write_json
from imstep.runs.interrupt import Interrupt
from imstep.runs.live import ComparisonProgress, endings, result_table
from imstep.runs.records import Comparison
from imstep.runs.rundir import RunDirectoryError
from imstep.tasks import get_task

__all__ = ["ComparisonRequest", "run_accuracy", "run_comparison"]

RECORD = "comparison.json"


@dataclass(frozen=True)
class ComparisonRequest:
    """What is to be compared; see `imstep.runs.compare.compare`.

    Args:
        tune: choose learning rates by a sweep; otherwise each optimizer's default is taken.
    """

    task: str
    optimizers: Sequence[str] = DEFAULT_OPTIMIZERS
    budget: float = DEFAULT_BUDGET
    seed: int = 0
    batch_size: int | None = None
    threads: int | None = None
    data: Path | None = None
    examples: int | None = None
    device: str = "cpu"
    tune: bool = True

    @property
    def command(self) -> str:
        """The command line that repeats it."""
        words = ["imstep", "compare", self.task, "--budget", f"{self.budget:g}", "--seed", str(self.seed)]
        words += ["--optimizers", ",".join(self.optimizers)]
        given = {
            "--batch-size": self.batch_size,
            "--threads": self.threads,
            "--data": self.data,
            "--examples": self.examples,
        }
        words += [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        words += ["--device", self.device] if self.device != "cpu" else []
        return " ".join(words + ([] if self.tune else ["--no-tune"]))


def run_comparison(
    request: ComparisonRequest, out: Path, console: Console, *, overwrite: bool = False
) -> bool:
    """Compare, then write report.html, summary.png and comparison.json into `out`.

    The record is written whenever a setting is done; one that is unfinished and by the same request is gone on with.

    Returns:
        Whether the comparison reached its end; False if it was interrupted (and saved as far as it was complete).

    Raises:
        TaskError, OptimizerError, TrainingError: a setting that cannot be.
        RunDirectoryError: `out` holds something that may not be replaced.
    """
    earlier = None if overwrite else _unfinished(out / RECORD, request.command)
    if earlier is None:
        _claim(out, RECORD, overwrite)
    minibatch = MINIBATCH if get_task(request.task).has_batches else None
    rivals = contestants(request.optimizers, batch_size=request.batch_size, minibatch=minibatch)
    if not request.tune:
        rivals = [replace(rival, learning_rates=()) for rival in rivals]
    with ComparisonProgress(console) as progress, Interrupt(
        lambda: progress.announce("finishing this step, then the report (Ctrl-C again: stop at once)")
    ) as interrupt:
        comparison = compare(
            request.task,
            rivals,
            budget=request.budget,
            seed=request.seed,
            threads=request.threads,
            data=request.data,
            examples=request.examples,
            device=request.device,
            command=request.command,
            listener=progress,
            earlier=earlier,
            keep=partial(_keep, out),
            stop=lambda: interrupt.requested,
        )
    if comparison.runs:
        _present(comparison, out, console)
    if comparison.waiting:
        kept = bool(comparison.runs or comparison.tried)
        note = "The settings that were done are kept. Go on with:" if kept else "No setting was done; nothing is kept."
        console.print(f"Interrupted. {note}", highlight=False)
        if kept:
            words = f"  {request.command} --out {shlex.quote(str(out))}"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
    return not comparison.waiting


def _keep(out: Path, comparison: Comparison) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, comparison.to_dict())


def _unfinished(record: Path, command: str) -> Comparison | None:
    """The comparison of a record, if it is unfinished and by that command."""
    try:
        comparison = Comparison.from_dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return comparison if comparison.waiting and comparison.command == command else None


def _present(comparison: Comparison, out: Path, console: Console) -> None:
    """Write the report and print its gist."""
    from imstep.runs.report import save_report  # matplotlib is slow to import: not before it is needed

    files = save_report(comparison, out)
    console.print()
    console.print(result_table(comparison))
    console.print()
    for line in endings(comparison):
        console.print(escape(line), highlight=False)
    console.print(f"[bold]{escape(comparison.verdict.headline)}[/]")
    for detail in comparison.verdict.details:
        console.print(escape(detail), highlight=False)
    console.print(
        f"report: {files.page}\nfigure: {files.picture}", highlight=False, markup=False, soft_wrap=True
    )


def run_accuracy(out: Path, console: Console, *, seed: int = 0, overwrite: bool = False) -> None:
    """Sweep h, then write accuracy.json and accuracy.png into `out`.

    Raises:
        RunDirectoryError: `out` holds something that may not be replaced.
    """
    from imstep.runs.accuracy_report import save_accuracy

    _claim(out, "accuracy.json", overwrite)
    with console.status("") as status:
        result = measure_accuracy(seed=seed, progress=status.update)
    record, figure = save_accuracy(result, out)
    for curve in result.curves:
        reached = (
            "no plateau" if curve.plateau is None else f"plateau over {curve.plateau.decades:.0f} decades"
        )
        console.print(
            f"{curve.network:<16} {curve.dtype}  {curve.method:<20} {reached}", highlight=False, markup=False
        )
    console.print(f"figure: {figure}\nrecord: {record}", highlight=False, markup=False, soft_wrap=True)


def _claim(out: Path, record: str, overwrite: bool) -> None:
    """Refuse to mix with, or silently replace, what is there already."""
    try:
        occupied = out.exists() and any(out.iterdir())
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be used as a folder: {error.strerror}.") from error
    if not occupied:
        return
    if not (out / record).exists():
        raise RunDirectoryError(f"{out} exists and holds other files. Choose another --out.")
    if not overwrite:
        raise RunDirectoryError(f"{out} holds an earlier result. Choose another --out, or add --overwrite.")
