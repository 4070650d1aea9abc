"""The measured part of the page of the documentation, and its figures, from the records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.strength.record import StrengthRecord
from benchmarks.strength.sides import SIDES
from benchmarks.strength.table import Cells, results, tuning, verdicts
from benchmarks.strength.tasks import TASKS, StrengthTask
from imstep.runs.seconds import Seconds
from imstep.runs.theme import Theme, linear_axis, log_axis, save_png

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- measured:begin -->\n", "<!-- measured:end -->\n"
_LOAD = {
    Seconds.WALL: "above 1, others shared the machine and seconds are too long",
    Seconds.PROCESSOR: "seconds are those that the processor computed for a run, whatever else it did",
}
_MACHINE = ("processor", "cores", "threads", "imstep", "PyTorch", "pytorch_optimizer", "Python")


def write_page(records: Sequence[StrengthRecord], docs: Path = DOCS) -> None:
    """Replace what stands between the page's markers, and draw the figures anew."""
    page, measured = docs / "strength.md", [record for record in records if record.runs]
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join(line for record in measured for line in _section(TASKS[record.task], record))
    page.write_text(before + BEGIN + body + END + after, encoding="utf-8")
    for record in measured:
        path = docs / "images" / _picture(record)
        save_png(lambda theme, record=record: _figure(TASKS[record.task], record, theme), path)


def _picture(record: StrengthRecord) -> str:
    return f"strength-{record.task}.png"


def _section(task: StrengthTask, record: StrengthRecord) -> list[str]:
    batch = "full batch" if task.batch_size is None else f"batches of {task.batch_size}"
    return [
        f"## {task.title}",
        "",
        f"{task.about} {batch[0].upper()}{batch[1:]}.",
        "",
        *made(record),
        "",
        f"![Losses of {task.title}](images/{_picture(record)})",
        "",
        "### Figures to reach",
        "",
        *markdown(verdicts(task, record)),
        "### Results",
        "",
        "Median of the seeds (lowest to highest); eq.: gradient-equivalents.",
        "",
        *markdown(results(task, record, spread=True)),
        "### Tuning",
        "",
        *markdown(tuning(task, record)),
    ]


def made(record: StrengthRecord) -> list[str]:
    """When and on what the runs were made; what differs between them is listed."""
    runs = record.runs
    dates, loads = sorted(r.about["date"] for r in runs), [float(r.about["load average"]) for r in runs]
    commits = sorted({r.about["commit"] for r in runs})
    machine = "; ".join(f"{key} {' or '.join(sorted({r.about[key] for r in runs}))}" for key in _MACHINE)
    return [
        f"{len(runs)} runs, {dates[0]} to {dates[-1]}; {machine}; commit {', '.join(commits)}; load average when a run "
        f"began {min(loads):g} to {max(loads):g} ({_LOAD[record.clock]})."
    ]


def markdown(content: Cells) -> list[str]:
    """The cells as a table."""
    if not content.rows:
        return ["Not measured.", ""]
    row = lambda cells: f"| {' | '.join(cells)} |"
    return [row(content.head), row(["---"] * len(content.head)), *map(row, content.rows), ""]


def _figure(task: StrengthTask, record: StrengthRecord, theme: Theme) -> Figure:
    """Every run's training loss by cost and by the clock, held-out loss by the clock."""
    panels = [("cost", "train", "Training loss by cost"), ("seconds", "train", "Training loss by the clock")]
    panels += [("seconds", "heldout", "Held-out loss by the clock")]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    for axes, (x, y, title) in zip(figure.subplots(1, 3), panels, strict=True):
        drawn = []
        for index, name in enumerate(n for n in task.sides if record.of(n)):
            color, dash = theme.series[index % len(theme.series)], "--" if index >= len(theme.series) else "-"
            for k, run in enumerate(record.of(name)):
                points = [p for p in run.curve if getattr(p, y) > 0]
                xs, ys = [getattr(p, x) for p in points], [getattr(p, y) for p in points]
                drawn += ys[len(ys) // 20 :]
                axes.plot(xs, ys, dash, color=color, lw=1.0, label=SIDES[name].title if k == 0 else None)
        log_axis(axes, "y", decades=math.log10(max(drawn) / min(drawn)))
        linear_axis(axes, "x", whole=True)
        axes.set(title=title, xlabel="gradient-equivalents" if x == "cost" else "seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(0.95 * min(drawn), max(drawn))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=7, fontsize=9)
    return figure
