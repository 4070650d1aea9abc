"""What is asked of the bench: the jobs that each entry takes, how long they last, and what of them is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from imstep.bench.entry import HELDOUT, Entry
from imstep.bench.sides import Options, Side
from imstep.bench.store import BenchRun, Store
from imstep.bench.work import Job
from imstep.runs.rows import TrainingError

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
