"""A call of the bench: which runs are made in which order, and how it goes on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from imstep.bench.entry import Entry
from imstep.bench.progress import BenchProgress
from imstep.bench.request import BenchRequest, chosen, estimate, gather, runs_of, trials_of
from imstep.bench.store import BenchRun, Store
from imstep.bench.work import AbsentError, Apart, DiedError, Job, run_apart
from imstep.runs.interrupt import Interrupt
from imstep.runs.rows import TrainingError
from imstep.runs.seconds import Seconds
from imstep.runs.verdict import short

__all__ = ["run_bench"]


class _Stop(Exception):
    """Asked to begin no more runs."""


@dataclass
class _Session:
    """What the runs of one call share."""

    request: BenchRequest
    store: Store
    console: Console
    progress: BenchProgress
    stop: Callable[[], bool]
    launch: Callable[[Job], Apart]
    jobs: int
    died: int = 0
    running: list[Apart] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)

    def all(self) -> bool:
        """Tune and run all contestants of all entries; whether it was not asked to stop before."""
        whole = False
        try:
            with suppress(_Stop):
                for entry in self.request.entries:
                    self.entry(entry)
                whole = True
            self.finish()
        finally:
            for run in self.running:
                run.kill()
        return whole

    def entry(self, entry: Entry) -> None:
        """Tune all contestants of an entry and begin their runs; what was made before is not made again."""
        sides = entry.contestants()
        plans = {side.name: trials_of(entry, side, self.request.trials) for side in sides}
        # In turn, so that all meet the machine in the same moods.
        for k in range(self.request.trials):
            for side in sides:
                if k < len(plans[side.name]):
                    self.make(plans[side.name][k])
        self.finish()
        final: list[list[Job]] = []
        for side in sides:
            tried = [self.store.find(job) for job in plans[side.name]]
            if all(tried):
                options = chosen(entry, [run for run in tried if run is not None], plans[side.name])
                final.append(runs_of(entry, side, options, self.request.seeds))
        for k in range(len(self.request.seeds)):
            for jobs in final:
                self.make(jobs[k])

    def make(self, job: Job) -> None:
        """Begin a run unless it is there, as soon as fewer run than may."""
        if self.store.find(job) is not None:
            return
        while len(self.running) >= self.jobs:
            self.hear()
        if job.entry.label in self.absent:
            return
        if self.stop():
            raise _Stop
        self.progress.begin(job)
        self.running.append(self.launch(job))

    def finish(self) -> None:
        """Wait until nothing runs."""
        while self.running:
            self.hear()

    def hear(self) -> None:
        """Wait until some run tells something; keep what is finished."""
        ready = wait([run.pipe for run in self.running])
        for run in [run for run in self.running if run.pipe in ready]:
            job, record = run.job, None
            try:
                record = run.hear(partial(self.progress.at, job))
                if record is None:
                    continue
            except DiedError as error:
                self.died += 1
                self.console.print(f"[red]{escape(f'{_name(job)}: {error}')}[/]; not kept")
            except AbsentError as error:
                self.leave_out(job.entry, str(error))
            self.running.remove(run)
            line = "" if record is None else _line(job, self.store.keep(job, record))
            self.progress.end(job, line)

    def leave_out(self, entry: Entry, why: str) -> None:
        """An entry whose data is not there."""
        if entry.label not in self.absent:
            self.absent.add(entry.label)
            self.console.print(f"[yellow]left out:[/] {escape(entry.label)}: {escape(why)}", soft_wrap=True)
            self.progress.skip(entry.label)


def _name(job: Job) -> str:
    return f"{job.entry.label}, {job.side}, {job.kind}"


def _line(job: Job, run: BenchRun) -> str:
    measure = job.entry.measure
    best = run.best(measure)
    options = ", ".join(f"{name} {value:g}" for name, value in job.options.items())
    words = f"{_name(job)}{f' ({options})' if job.trial else ''}: {measure.title} "
    words += short(measure.shown(best)) if math.isfinite(best) else "none"
    points = run.points
    spent = f", {points[-1]['cost']:.0f} eq., {points[-1]['seconds']:.1f} s" if points else ""
    ending = str(run.record["ending"])
    return words + spent + (f"; {ending}" if ending.startswith(("failed", "refused", "diverged")) else "")


def run_bench(
    request: BenchRequest,
    out: Path,
    console: Console,
    *,
    make: bool = True,
    jobs: int = 1,
    launch: Callable[[Job], Apart] = run_apart,
) -> bool:
    """Make all runs that the folder lacks, then the pages and the table from all that it holds.

    Args:
        request: what is asked for.
        out: the folder.
        console: where to print.
        make: whether to run; otherwise only the pages are written.
        jobs: how many runs go side by side.
        launch: begins a run.

    Returns:
        Whether all is there now; False if it was interrupted or a process died.

    Raises:
        TaskError, OptimizerError, TrainingError: a request that cannot be.
        RunDirectoryError, RecordError: the folder holds something else.
    """
    from imstep.bench.report import write_report  # matplotlib is slow to import: not before it is needed

    if jobs < 1 or (jobs > 1 and any(entry.clock is Seconds.WALL for entry in request.entries)):
        raise TrainingError(
            f"{jobs} runs side by side: give at least one; and one where seconds pass on the wall, in which other runs "
            "would be measured, too (more go by processor seconds, the default of --clock)."
        )
    store, whole = Store(out), True
    for entry in request.entries:
        gather(request, entry, store)  # what differs from the request is told before anything runs
    if make:
        whole = _run_all(request, store, console, jobs, launch)
    table = write_report(request, store)
    if table is None:
        console.print("No run is finished yet.")
        return whole
    console.print(table)
    console.print(f"report: {out / 'index.html'}", highlight=False, markup=False, soft_wrap=True)
    return whole


def _run_all(
    request: BenchRequest, store: Store, console: Console, jobs: int, launch: Callable[[Job], Apart]
) -> bool:
    progress = BenchProgress(console, _lacking(request, store), jobs)
    note = "finishing what runs, then the report (Ctrl-C again: stop at once, without it)"
    try:
        with progress, Interrupt(lambda: progress.announce(note)) as interrupt:
            session = _Session(request, store, console, progress, lambda: interrupt.requested, launch, jobs)
            whole = session.all()
    except KeyboardInterrupt:
        whole = False
    if not whole:
        console.print("Interrupted. Finished runs are kept; the same command goes on.")
    return whole and session.died == 0


def _lacking(request: BenchRequest, store: Store) -> dict[tuple[str, str, str], float]:
    """The runs that are not there: (entry, side, kind) -> seconds, roughly."""
    found = {}
    for entry in request.entries:
        for side in entry.contestants():
            jobs = [*trials_of(entry, side, request.trials), *runs_of(entry, side, {}, request.seeds)]
            for job in jobs:
                if not store.path(entry.label, side.name, job.kind).exists():
                    found[entry.label, side.name, job.kind] = estimate(entry, side, job)
    return found
