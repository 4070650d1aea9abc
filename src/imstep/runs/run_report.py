"""A page about one training run: losses over cost and time, what it used, the anatomy of its steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from imstep.runs.anatomy import anatomy_panels
from imstep.runs.config import RunConfig
from imstep.runs.files import write_atomically
from imstep.runs.page import legend, page, panels, section
from imstep.runs.records import Run
from imstep.runs.surfaces import surface_panels
from imstep.runs.theme import Theme, linear_axis, log_axis
from imstep.runs.watch_report import watched_section
from imstep.tasks import Surface, Task

__all__ = ["save_run_report"]

POINTS = 1000
"""At most so many points a line: a long run's page stays small."""

Rows = Sequence[Mapping[str, Any]]


def save_run_report(
    path: Path,
    config: RunConfig,
    task: Task,
    rows: Rows,
    facts: Mapping[str, str],
    surfaces: tuple[Surface, Surface] | None = None,
) -> Path:
    """Write a self-contained `report.html` into a run directory.

    Args:
        path: the run directory.
        config: the run.
        task: its task.
        rows: the lines of steps.jsonl.
        facts: name -> text, what the run reached and used.
        surfaces: the solution and the network, to be drawn.
    """
    steps = tuple({**row["record"], "cost": row["cost"]} for row in rows if row.get("record"))
    sections = [
        section("Losses", _losses(rows)),
        section("Steps", panels(anatomy_panels(_as_run(config, steps)), "steps")) if steps else "",
        watched_section(rows),
        _solution(surfaces, config.optimizer),
        section("What it reached and used", _list(facts)),
        section("Settings", _list({k: str(v) for k, v in config.to_dict().items() if v not in (None, {})})),
    ]
    text = page(task.title, "imstep train", f"{task.description} Trained by {config.optimizer}.", "\n".join(sections))
    file = path / "report.html"
    write_atomically(file, text.encode())
    return file


def _solution(surfaces: tuple[Surface, Surface] | None, label: str) -> str:
    if surfaces is None:
        return ""
    return section("Solution", panels(surface_panels(surfaces[0], [(label, surfaces[1])]), "surfaces"))


def _as_run(config: RunConfig, steps: tuple[dict[str, Any], ...]) -> Run:
    """The steps in the form that the comparison's figures take."""
    statuses = dict(Counter(str(step["status"]) for step in steps if step.get("status")))
    return Run(config.optimizer, config.optimizer, dict(config.options), (), statuses=statuses, anatomy=steps)


def _losses(rows: Rows) -> str:
    """Batch, training and held-out loss over gradient-equivalents and over seconds."""
    colors = {"batch, at the start of a step": "muted", "training set": "s0", "held out": "s1"}
    names = legend([(name, f"var(--{color})") for name, color in colors.items()])
    draws = [(f"Loss over {clock}", partial(_lines, rows, clock)) for clock in ("cost", "seconds")]
    return names + panels(draws, "losses")


def _lines(rows: Rows, clock: str, axes: Axes, theme: Theme) -> None:
    # A step's loss is that at its start, where the row before it ended; evaluations move neither clock.
    starts = [0.0, *(row[clock] for row in rows)]
    timed = list(zip(starts, rows, strict=False))
    seen: list[float] = []
    for key, color, width in (
        ("loss", theme.muted, 0.7),
        ("train_loss", theme.series[0], 2.2),
        ("heldout_loss", theme.series[1], 2.2),
    ):
        points = [(at, row[key]) for at, row in timed if row.get(key) is not None and row[key] > 0]
        points = points[:: len(points) // POINTS + 1]
        axes.plot(*(zip(*points, strict=True) if points else ((), ())), color=color, lw=width)
        seen += [value for _, value in points]
    decades = math.log10(max(seen) / min(seen)) if seen else 1.0
    log_axis(axes, "y", decades=decades)
    linear_axis(axes, "x")
    axes.set_xlim(left=0)
    words = ("by cost", "gradient-equivalents") if clock == "cost" else ("by the clock", "seconds in steps")
    axes.set(title=f"Loss {words[0]}", xlabel=words[1], ylabel="loss")


def _list(facts: Mapping[str, str]) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{entries}</dl>"
