"""Comparisons and the accuracy sweep as the user sees them: progress, files, a table, the verdict."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from imstep.runs.accuracy import measure_accuracy
from imstep.runs.compare import DEFAULT_BUDGET, compare
from imstep.runs.contestants import MINIBATCH, RIVALS, Contestant, contestants
from imstep.runs.files import obstacle, write_json
from imstep.runs.interrupt import Interrupt
from imstep.runs.live import ComparisonProgress, endings, result_table
from imstep.runs.records import Comparison
from imstep.runs.rundir import RunDirectoryError
from imstep.runs.sources import hashes
from imstep.runs.suitability import suited
from imstep.runs.verdict import short
from imstep.tasks import TableOptions, Task, find_task
from imstep.tasks.base import check_seed

__all__ = ["ComparisonRequest", "claim", "run_accuracy", "run_comparison"]

RECORD = "comparison.json"


@dataclass(frozen=True)
class ComparisonRequest:
    """What is to be compared; see `imstep.runs.compare.compare`.

    Args:
        optimizers: who takes part, the subject first; None for the one that suits the task best, Adam and L-BFGS.
        budget: gradient-equivalents for each; None for the task's.
        tune: choose learning rates by a sweep; otherwise each optimizer's default is taken.
    """

    task: str
    optimizers: Sequence[str] | None = None
    budget: float | None = None
    seed: int = 0
    batch_size: int | None = None
    threads: int | None = None
    data: Path | None = None
    examples: int | None = None
    device: str = "cpu"
    tune: bool = True
    dtype: str = "float32"
    table: TableOptions | None = None

    @property
    def command(self) -> str:
        """The command line that repeats it."""
        words = ["imstep", "compare", self.task]
        words += [] if self.budget is None else ["--budget", f"{self.budget:g}"]
        words += ["--seed", str(self.seed)]
        words += [] if self.optimizers is None else ["--optimizers", ",".join(self.optimizers)]
        given = {
            "--batch-size": self.batch_size,
            "--threads": self.threads,
            "--data": self.data,
            "--examples": self.examples,
        }
        words += [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--dtype", self.dtype] if self.dtype != "float32" else []
        words += [] if self.table is None else self.table.words
        return shlex.join(words + ([] if self.tune else ["--no-tune"]))


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
    origin = find_task(request.task, request.table)
    task, sources = origin.task, hashes(origin)
    budget = request.budget if request.budget is not None else task.budget or DEFAULT_BUDGET
    request = replace(request, budget=budget)
    for note in task.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    earlier = None if overwrite else _unfinished(out / RECORD, request.command, sources)
    if earlier is None:
        claim(out, RECORD, overwrite)
    kept = [] if earlier is None else [earlier]
    try:
        with ComparisonProgress(console) as progress, Interrupt(
            lambda: progress.announce("finishing this step, then the report (Ctrl-C again: stop at once)")
        ) as interrupt:
            comparison = compare(
                task,
                _rivals(request, task),
                budget=budget,
                seed=request.seed,
                threads=request.threads,
                data=request.data,
                examples=request.examples,
                device=request.device,
                dtype=request.dtype,
                command=request.command,
                sources=sources,
                listener=progress,
                earlier=earlier,
                keep=lambda found: _keep(out, found, kept),
                stop=lambda: interrupt.requested,
            )
    except KeyboardInterrupt:
        console.print("Stopped at once, without a report.")
        _how_to_go_on(request, out, kept, console)
        return False
    if comparison.runs:
        _present(comparison, out, console)
    if comparison.waiting:
        console.print("Interrupted.")
        _how_to_go_on(request, out, kept, console)
    return not comparison.waiting


def _rivals(request: ComparisonRequest, task: Task) -> list[Contestant]:
    names = (suited(task)[0], *RIVALS) if request.optimizers is None else request.optimizers
    minibatch = MINIBATCH if task.has_batches else None
    rivals = contestants(names, batch_size=request.batch_size, minibatch=minibatch)
    return rivals if request.tune else [replace(rival, learning_rates=()) for rival in rivals]


def _how_to_go_on(request: ComparisonRequest, out: Path, kept: Sequence[Comparison], console: Console) -> None:
    """What an interrupted comparison has done so far, and the command that goes on."""
    if not kept:
        console.print("No setting was done; nothing is kept.")
        return
    done = [f"{run.label} (lowest {short(run.best.train)})" for run in (*kept[-1].runs, *kept[-1].tried)]
    console.print(f"Done and kept: {', '.join(done)}. Go on with:", highlight=False, markup=False, soft_wrap=True)
    words = f"  {request.command} --out {shlex.quote(str(out))}"
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def _keep(out: Path, comparison: Comparison, kept: list[Comparison]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, comparison.to_dict())
    kept[:] = [comparison]


def _unfinished(record: Path, command: str, sources: Mapping[str, str]) -> Comparison | None:
    """The comparison of a record, if it is unfinished, and by that command on the same files.

    Raises:
        RunDirectoryError: one's own files have changed since.
    """
    try:
        comparison = Comparison.from_dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    if not comparison.waiting or comparison.command != command:
        return None
    changed = [name for name, digest in sources.items() if comparison.environment.get(name) != digest]
    if changed:
        raise RunDirectoryError(
            f"{changed[0]} has changed since the comparison in {record.parent} was interrupted: what is done there "
            "does not compare with what would follow. Add --overwrite to begin anew, or choose another --out."
        )
    return comparison


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

    claim(out, "accuracy.json", overwrite)
    check_seed(seed)
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


def claim(out: Path, record: str, overwrite: bool) -> None:
    """Refuse to mix with, or silently replace, what is there already, and folders that cannot be made."""
    try:
        occupied = out.exists() and any(out.iterdir())
        above = obstacle(out)
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be used as a folder: {error.strerror}.") from error
    if above is not None:
        raise RunDirectoryError(f"{out} cannot be used as a folder: nothing can be made in {above}.")
    if not occupied:
        return
    if not (out / record).exists():
        raise RunDirectoryError(f"{out} exists and holds other files. Choose another --out.")
    if not overwrite:
        raise RunDirectoryError(f"{out} holds an earlier result. Choose another --out, or add --overwrite.")
