"""What the records say, as tables of plain cells: for the terminal and for the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.pinn.sides import OWN, SIDES
from benchmarks.pinn.tasks import Goal, RaceTask, reached
from benchmarks.strength.record import StrengthRecord
from benchmarks.strength.run import StrengthRun
from benchmarks.strength.table import Cells
from imstep.runs.seconds import Seconds
from imstep.runs.verdict import short

SHARE = 1 / 10
"""Of the best rival's seconds to its final error, what imstep may take for the same error."""
OPEN = "not measured"


def summary(tasks: Sequence[RaceTask], records: Sequence[StrengthRecord]) -> Cells:
    """A row for each problem: published, to reach, here, and the ratio of seconds to the best rival's final error."""
    head = ("problem, error", "published best", "to reach", "here, median of seeds", "seconds to a rival's final error")
    rows = []
    for task, record in zip(tasks, records, strict=True):
        name = f"{task.name}, {'relative' if task.relative else 'RMS'}"
        name += ", processor seconds" if record.clock is Seconds.PROCESSOR else ""
        goals = "; ".join(map(_goal, task.goals))
        rows.append((name, task.published, goals, _here(task, record.of(task.own)), _ratio(task, record)))
    return Cells(head, tuple(rows))


def _goal(goal: Goal) -> str:
    return f"{goal.text} {'in the end' if goal.seconds is None else f'within {goal.seconds:g} s'}"


def _here(task: RaceTask, runs: Sequence[StrengthRun]) -> str:
    if not runs:
        return OPEN
    parts, limit = [], runs[0].limit["seconds"]
    for goal in task.goals:
        seconds = seconds_to(runs, goal.error)
        met = seconds <= (math.inf if goal.seconds is None else goal.seconds) and math.isfinite(seconds)
        when = f"after {_two_digits(seconds)} s" if math.isfinite(seconds) else f"never in {limit:g} s"
        parts.append(f"{goal.text} {when}, {'met' if met else '**missed**'}")
    return "; ".join([*parts, f"at the end {short(final_error(runs))}"]) + _few(runs)


def _few(runs: Sequence[StrengthRun]) -> str:
    return "" if len(runs) >= 5 else f" ({len(runs)} seed{'s' if len(runs) > 1 else ''})"


def _ratio(task: RaceTask, record: StrengthRecord) -> str:
    """imstep's seconds to the final error of the best rival over those of the rival."""
    rivals = {name: runs for name in task.sides if name not in OWN and (runs := record.of(name))}
    own = record.of(task.own)
    if not own or not rivals:
        return OPEN
    name = min(rivals, key=lambda name: final_error(rivals[name]))
    error = final_error(rivals[name])
    theirs, ours = min(seconds_to(rivals[name], error), task.limit), seconds_to(own, error)
    if theirs == 0:
        return "no rival improved on its start"
    against = f"{SIDES[name].title}, {short(error)} after {_two_digits(theirs)} s"
    if not math.isfinite(ours):
        return f"**missed**: never ({against})"
    ratio = ours / theirs
    return f"{ratio:.2g}, {'met' if ratio <= SHARE else '**missed**'} ({against})"


def _two_digits(seconds: float) -> str:
    """As in 4.6 and 130."""
    return f"{float(f'{seconds:.2g}'):g}"


def final_error(runs: Sequence[StrengthRun]) -> float:
    """The median of the seeds' errors at the end, of an even number the higher one."""
    ends = [run.curve[-1].heldout for run in runs]
    return statistics.median_high(e if e == e else math.inf for e in ends)


def seconds_to(runs: Sequence[StrengthRun], error: float) -> float:
    """The median of the seeds' seconds to an error; infinity for never."""
    found = [reached(run, error) for run in runs]
    return statistics.median_high(p.seconds if p else math.inf for p in found)


def results(task: RaceTask, record: StrengthRecord) -> Cells:
    """A row for each side: error after a tenth of the time and at the end, the loss then, seconds to the goals."""
    marks = [f"error, {mark:g} s" for mark in task.marks]
    goals = [f"s to {goal.text}" for goal in task.goals]
    head = ("side", "seeds", *marks, "loss, end", *goals, "gradients in all", "of those, to the lowest error")
    return Cells(head, tuple(_result(task, name, runs) for name in task.sides if (runs := record.of(name))))


def _result(task: RaceTask, name: str, runs: Sequence[StrengthRun]) -> tuple[str, ...]:
    ends, count = [run.curve[-1] for run in runs], "{:,.0f}".format
    row = [SIDES[name].title, str(len(runs))]
    row += [_text([run.last_at("seconds", mark).heldout for run in runs], short) for mark in task.marks[:-1]]
    row += [_text([p.heldout for p in ends], short), _text([p.train for p in ends], short)]
    for goal in task.goals:
        points = [reached(run, goal.error) for run in runs]
        row.append(_text([p.seconds if p else math.inf for p in points], _two_digits))
    lowest = [min(run.curve, key=lambda p: p.heldout if p.heldout == p.heldout else math.inf) for run in runs]
    return (*row, _text([p.cost for p in ends], count), _text([p.cost for p in lowest], count))


def _text(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The median of the seeds and their extremes; infinity stands for never."""
    known = [v if v == v else math.inf for v in values]
    show = lambda v: form(v) if math.isfinite(v) else "never"
    middle = show(statistics.median_high(known))
    return middle if min(known) == max(known) else f"{middle} ({show(min(known))} to {show(max(known))})"


def hours(
    tasks: Sequence[RaceTask], records: Sequence[StrengthRecord], names: Sequence[str], seeds: Sequence[int]
) -> float:
    """Hours of steps for seeds of the named sides, or all, that the records lack."""
    seconds = 0.0
    for task, record in zip(tasks, records, strict=True):
        for side in (SIDES[name] for name in task.sides if not names or name in names):
            trials, trial = side.trials_on(task.name), task.trial_of(side.name).seconds or 0.0
            if len(trials) > 1 and record.sweep(side, task.name, trial) is None:
                seconds += len(trials) * trial
            seconds += len(set(seeds) - {run.seed for run in record.of(side.name)}) * task.limit
    return seconds / 3600
