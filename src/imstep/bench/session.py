"""A call of the bench: what is to be made, in which order, and how it goes on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from imstep.bench.entry import HELDOUT, Entry
from imstep.bench.progress import BenchProgress
from imstep.bench.sides import Options, Side
from imstep.bench.store import BenchRun, Store
from imstep.bench.work import AbsentError, Apart, DiedError, Job, run_apart
from imstep.runs.interrupt import Interrupt
from imstep.runs.rows import TrainingError
from imstep.runs.seconds import Seconds
from imstep.runs.verdict import short

__all__ = [
    "FULL_TRIALS", "SEEDS", "TRIALS", "TUNING_SEED", "BenchRequest", "Results", "estimate", "gather", "run_bench",
    "shortened",
]  # fmt: skip

TRIALS = 4
FULL_TRIALS = 8
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
START = 1.5
"""Seconds until a run's process is ready, roughly."""
EVALUATION = 0.4
"""Gradients' time that one evaluation of the training and the held-out loss takes, roughly."""
SHORT_BUDGET, SHORT_EXAMPLES = 4.0, 64

Results = Mapping[str, Sequence[BenchRun]]
"""By side: its runs, or the trials of its tuning."""


@dataclass(frozen=True)
class BenchRequest:
    """What is asked of the bench.

    Args:
        entries: what is trained.
        trials: settings that each contestant with something to tune tries.
        seeds: of the runs that count.
    """

    entries: Sequence[Entry]
    trials: int = TRIALS
    seeds: Sequence[int] = SEEDS

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise TrainingError("the bench needs at least one trial and one seed, and each seed once.")
        if TUNING_SEED in self.seeds:
            raise TrainingError(f"seed {TUNING_SEED} is that of the trials: give others.")


def shortened(entry: Entry) -> Entry:
    """The entry in seconds: few examples, a few gradients; for a look at what the bench does, and for tests."""
    found = entry.asked(budget=SHORT_BUDGET)
    size = None if entry.batch_size is None else SHORT_EXAMPLES // 4
    return replace(found, examples=SHORT_EXAMPLES, batch_size=size, sweep="")


def trials_of(entry: Entry, side: Side, number: int) -> list[Job]:
    """The jobs of a contestant's tuning; none where there is nothing to tune."""
    ranges = entry.ranges_of(side)
    drawn = side.trials(number, ranges) if ranges else []
    return [_job(entry, side, f"trial-{k:02d}", options, TUNING_SEED) for k, options in enumerate(drawn)]


def runs_of(entry: Entry, side: Side, options: Options, seeds: Sequence[int]) -> list[Job]:
    """The jobs of a contestant's runs with the options that were chosen."""
    return [_job(entry, side, f"seed-{seed}", options, seed) for seed in seeds]


def _job(entry: Entry, side: Side, kind: str, options: Options, seed: int) -> Job:
    limits = entry.trial_limits if kind.startswith("trial") else entry.limits
    return Job(entry, side.name, side.spec.name, kind, options, seed, limits)


def chosen(entry: Entry, tried: Sequence[BenchRun], jobs: Sequence[Job]) -> Options:
    """The options of the trial whose measure came lowest; of none if there was nothing to tune.

    Where runs end at the target, of the one that was there first: what comes below it is chance. If none was, of the
    least held-out loss, since answers are as wrong as ever until a loss has long begun to fall.
    """
    if not jobs:
        return {}
    measure = HELDOUT if entry.until_solved else entry.measure
    costs = [run.to_reach(entry.measure, entry.ending, "cost") for run in tried]
    best = min(range(len(jobs)), key=lambda k: (costs[k], tried[k].best(measure), k))
    return jobs[best].options


def estimate(entry: Entry, side: Side, job: Job | None = None, trials: int = TRIALS, seeds: int = len(SEEDS)) -> float:
    """Seconds of a job, or of all of a contestant's: from the time of a gradient, roughly."""
    looking = lambda trial: START + EVALUATION * entry.gradient * entry.looks_of(trial)
    of = lambda budget: 1.2 * side.pace * entry.gradient * budget
    run = looking(False) + (1.1 * entry.seconds if entry.seconds is not None else of(entry.budget))
    trial = looking(True) + of(entry.trial_limits.budget or 0.0)
    if job is not None:
        return trial if job.trial else run
    return (trials * trial if entry.ranges_of(side) else 0.0) + seeds * run


def gather(request: BenchRequest, entry: Entry, store: Store) -> tuple[Results, Results]:
    """The finished trials and runs of an entry, as far as there are any."""
    tuning: dict[str, list[BenchRun]] = {}
    runs: dict[str, list[BenchRun]] = {}
    for side in entry.contestants():
        jobs = trials_of(entry, side, request.trials)
        tried = [run for job in jobs if (run := store.find(job)) is not None]
        tuning[side.name] = tried
        if len(tried) == len(jobs):
            wanted = runs_of(entry, side, chosen(entry, tried, jobs), request.seeds)
            runs[side.name] = [run for job in wanted if (run := store.find(job)) is not None]
    return tuning, runs


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
