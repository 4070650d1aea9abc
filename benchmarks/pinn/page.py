"""The measured part of docs/pinn.md, and its figures, from the records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pinn.sides import SIDES
from benchmarks.pinn.table import OPEN, hours, results, summary
from benchmarks.pinn.tasks import TASKS, RaceTask
from benchmarks.record_page import DOCS, put
from benchmarks.strength.page import made, markdown
from benchmarks.strength.record import StrengthRecord
from benchmarks.strength.table import tuning
from imstep.runs.rows import Ending
from imstep.runs.theme import Theme, linear_axis, log_axis, save_png
from imstep.tasks import PhysicsTask

SEEDS = (0, 1, 2, 3, 4)
_PANELS = (("seconds", "heldout", "Error"), ("cost", "heldout", "Error by cost"), ("seconds", "train", "Loss"))


def write_page(records: Sequence[StrengthRecord], docs: Path = DOCS) -> None:
    """Replace what stands between the page's marks, and draw the figures of what was measured anew.

    Args:
        records: of all tasks, in order.
        docs: the folder of the page.
    """
    page, tasks = docs / "pinn.md", [TASKS[record.task] for record in records]
    put("pinn-summary", page, "\n".join([_state(tasks, records), "", *markdown(summary(tasks, records))]).rstrip())
    measured = [record for record in records if record.runs]
    lines = [line for record in measured for line in _section(TASKS[record.task], record)]
    put("pinn", page, "\n".join(lines).rstrip() or f"{OPEN.capitalize()} yet.")
    for record in measured:
        save_png(lambda theme, record=record: _figure(TASKS[record.task], record, theme), docs / "images" / _of(record))


def _state(tasks: Sequence[RaceTask], records: Sequence[StrengthRecord]) -> str:
    """How much of the race has been run."""
    done, wanted = sum(len(r.runs) for r in records), sum(len(t.sides) * len(SEEDS) for t in tasks)
    whole, left = (hours(tasks, rs, (), SEEDS) for rs in ([StrengthRecord(t.name) for t in tasks], records))
    open_still = f"; {left:.1f} are missing" if done < wanted else ""
    return f"{done} of {wanted} runs are recorded. The race takes {whole:.1f} hours of steps{open_still}."


def _of(record: StrengthRecord) -> str:
    return f"pinn-{record.task}.png"


def _section(task: RaceTask, record: StrengthRecord) -> list[str]:
    return [
        f"### {task.title}",
        "",
        f"`{task.name}`: {task.about} {task.limit:g} s a run, {task.trial_of('').seconds:g} s a trial.",
        "",
        *made(record),
        "",
        f"![Solution, errors and losses of {task.title}](images/{_of(record)})",
        "",
        *_endings(record),
        "Median of the seeds (lowest to highest):",
        "",
        *markdown(results(task, record)),
        "Tuning, seconds and loss at points that no step saw:",
        "",
        *markdown(tuning(task, record, SIDES, "seconds a trial")),
    ]


def _endings(record: StrengthRecord) -> list[str]:
    """The runs that ended before their time."""
    early = [run for run in record.runs if run.ending != Ending.SECONDS.message]
    lines = [f"- {SIDES[run.side].title}, seed {run.seed}: {run.ending}." for run in early]
    return ["Ended before their time:", "", *lines, ""] if lines else []


def _figure(task: RaceTask, record: StrengthRecord, theme: Theme) -> Figure:
    """The solution and imstep's error where they can be drawn; below, every run's error and loss."""
    found = next((run.error for run in record.of(task.own) if run.error is not None), None)
    figure = Figure(figsize=(13, 7.4 if found else 4.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(0.9, 1)) if found else (None, figure)
    if upper is not None:
        _surfaces(upper.subplots(1, 2), task, np.array(found))
    every = lower.subplots(1, 3)
    for axes, (x, y, title) in zip(every, _PANELS, strict=True):
        _curves(axes, task, record, theme, x, y)
        axes.set(title=title, xlabel="gradient-equivalents" if x == "cost" else "seconds")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, fontsize=9)
    return figure


def _curves(axes: Axes, task: RaceTask, record: StrengthRecord, theme: Theme, x: str, y: str) -> None:
    drawn, starts = [], [1e-300]
    for index, name in enumerate(task.sides):
        for k, run in enumerate(record.of(name)):
            points = [p for p in run.curve if getattr(p, y) > 0 and getattr(p, x) > 0]
            xs, ys = [getattr(p, x) for p in points], [getattr(p, y) for p in points]
            drawn += ys
            starts += ys[:1]
            color, dash = theme.series[index % len(theme.series)], "--" if index >= len(theme.series) else "-"
            axes.plot(xs, ys, dash, color=color, lw=1.0, label=SIDES[name].title if k == 0 else None)
    most = 10 * max(filter(math.isfinite, starts))  # a side that diverges leaves the picture
    finite = [value for value in drawn if value <= most] or [1.0]
    log_axis(axes, "y", decades=math.log10(max(finite) / min(finite)))
    if x == "cost":
        log_axis(axes, "x", decades=4)  # a step of Newton's kind has many gradients' cost
    else:
        linear_axis(axes, "x", whole=True)
        axes.set_xlim(left=0)
    axes.set_ylim(0.7 * min(finite), 2 * max(finite))


def _surfaces(pair: Sequence[Axes], task: RaceTask, error: np.ndarray) -> None:
    recipe = task.recipe
    assert isinstance(recipe, PhysicsTask)
    assert recipe.reference is not None
    reference = recipe.reference()
    assert reference.shape is not None
    solution = reference.values[:, 0].reshape(reference.shape).numpy()
    across, up = ((float(x.min()), float(x.max())) for x in (reference.points[:, at] for at, _ in reference.axes))
    size = np.log10(np.maximum(np.abs(error), 1e-300))
    shown = ((solution, "Solution", "RdBu_r", {}), (size, "Error of imstep, seed 0: log₁₀", "viridis", _range(size)))
    for axes, (values, title, colours, limits) in zip(pair, shown, strict=True):
        image = axes.imshow(values, origin="lower", extent=(*across, *up), aspect="auto", cmap=colours, **limits)
        axes.grid(False)
        axes.set(title=title, xlabel=reference.axes[0][1], ylabel=reference.axes[1][1])
        axes.figure.colorbar(image, ax=axes)


def _range(size: np.ndarray) -> dict[str, float]:
    """Three decades below the largest error: where a solution is met exactly there is nothing to see."""
    return {"vmin": float(size.max()) - 3, "vmax": float(size.max())}
