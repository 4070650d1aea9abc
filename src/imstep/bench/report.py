"""The pages of a bench: one for each task, one with the table of all; and the same table as JSON and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from typing import Any

from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.table import Table

from imstep.bench.entry import Entry
from imstep.bench.request import BenchRequest, Results, gather
from imstep.bench.store import BenchRun, Store
from imstep.bench.summary import CLOCKS, HEAD, Standing, Summary, summarise
from imstep.bench.sweep import HEAD as SWEEP_HEAD
from imstep.bench.sweep import sweeps
from imstep.runs.files import write_atomically, write_json
from imstep.runs.page import legend, page, panels, section
from imstep.runs.records import finite
from imstep.runs.seconds import Seconds
from imstep.runs.theme import PAGE, Theme, linear_axis, log_axis
from imstep.runs.verdict import short
from imstep.tasks import get_task

__all__ = ["write_report"]

_MACHINE = ("processor", "instructions", "cores", "threads", "imstep", "PyTorch", "NumPy", "Python")
_RULES = (
    "Every contestant with something to tune has the same number of trials on a seed of its own, drawn from the ranges "
    "below; the best setting then runs from the other seeds. Contestants run in turn, each run in a process of its own "
    "with one thread. With mini-batches all are evaluated at averages of their iterates. Seconds are those of steps"
)
_SECONDS = {
    Seconds.PROCESSOR: ", in which the processor computes for the run: what else the machine does is not in them.",
    Seconds.WALL: ", that pass on the wall.",
}


def write_report(request: BenchRequest, store: Store) -> Table | None:
    """Write `index.html`, `summary.json`, `summary.md` and a page for each task; the table, or None without runs."""
    summaries, every = [], {}
    for entry in request.entries:
        tuning, runs = gather(request, entry, store)
        every[entry.label] = runs
        if (summary := summarise(entry, dict(runs))) is None:
            continue
        summaries.append(summary)
        text = _page(request, summary, tuning, runs)
        write_atomically(store.root / _file(entry), text.encode())
    if not summaries:
        return None
    rows = [s.cells for s in summaries]
    links = [f'<a href="{_file(s.entry)}">{escape(s.entry.label)}</a>' for s in summaries]
    swept = sweeps(request.entries, every)
    parts = [section("Who wins where", _table(HEAD, rows, links), _note())]
    parts += [section(s.title, _table(SWEEP_HEAD, s.rows), s.words) for s in swept]
    body = "\n".join(parts)
    clocks = "".join(words for clock, words in _SECONDS.items() if any(s.entry.clock is clock for s in summaries))
    lead = f"{len(rows)} task{'s' if len(rows) > 1 else ''}. {_RULES}{clocks}"
    write_atomically(store.root / "index.html", page("Bench", "imstep bench", lead, body).encode())
    write_json(store.root / "summary.json", finite([_plain(s) for s in summaries]))
    texts = [_marked(HEAD, rows)]
    texts += [f"{s.title}. {s.words}\n\n{_marked(SWEEP_HEAD, s.rows)}" for s in swept]
    write_atomically(store.root / "summary.md", "\n".join(texts).encode())
    table = Table(title="Who wins where", title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for name in HEAD:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _marked(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _file(entry: Entry) -> str:
    return f"{entry.label.replace('/', '_').replace(':', '-')}.html"


def _note() -> str:
    return (
        "Gradient-equivalents and seconds are told to the same level of the measure: the task's target, or the best "
        "that both imstep and the best peer reach in the median of the seeds. The best peer may differ from column to "
        "column."
    )


def _plain(summary: Summary) -> dict[str, Any]:
    shown = summary.entry.measure.shown
    return {
        "task": summary.entry.label,
        "measure": summary.entry.measure.column,
        "clock": summary.entry.clock.value,
        "level": shown(summary.level),
        "seeds": summary.seeds,
        "duels": {clock: {**asdict(duel), "factor": duel.factor} for clock, duel in summary.duels.items()},
        "standings": [
            {"side": s.side, "best": [shown(b) for b in s.best], "cost": s.cost, "seconds": s.seconds}
            for s in summary.standings
        ],
    }


def _page(request: BenchRequest, summary: Summary, tuning: Results, runs: Results) -> str:
    entry, task = summary.entry, get_task(summary.entry.task)
    batch = "full batch" if entry.batch_size is None else f"batches of {entry.batch_size}"
    limit = f"{entry.budget:g} gradient-equivalents" if entry.seconds is None else f"{entry.seconds:g} s"
    told = f"{batch[0].upper()}{batch[1:]}, {limit} a run, {entry.dtype}. Judged by {entry.measure.title}."
    told += f" A run that has reached {short(entry.target)} ends." if entry.until_solved and entry.target else ""
    lead = f"{task.description} {told}"
    every = [run for rows in (*tuning.values(), *runs.values()) for run in rows]
    parts = [
        _duels(summary),
        section("Result", _table(*_standings(summary)), f"Median of the seeds (best to worst). {_note()}"),
        _curves(entry, runs),
        section("Tuning", _table(*_tuning(entry, tuning)), _ranges(request, entry)),
        section("Machine and versions", _made(entry, every)),
    ]
    return page(task.title, f"imstep bench {entry.label}", lead, "\n".join(parts))


def _duels(summary: Summary) -> str:
    items = "".join(f"<li>{name}: {escape(summary.duels[c].words)}</li>" for c, name in CLOCKS.items() if summary.duels)
    return f'<section class="verdict"><p class="headline">{escape(summary.leader)}</p><ul>{items}</ul></section>'


def _standings(summary: Summary) -> tuple[Sequence[str], list[Sequence[str]]]:
    measure = summary.entry.measure
    head = (
        "contestant", "seeds", measure.title, "reached", "gradient-eq. to it", "seconds to it", "gradient-eq.",
        "seconds",
    )  # fmt: skip
    loss = lambda value: short(measure.shown(value))
    count, time = "{:,.0f}".format, "{:,.1f}".format

    def row(s: Standing) -> Sequence[str]:
        cost, seconds = ([end[k] for end in s.ends] for k in (0, 1))
        of_cost = lambda values: _spread(values, count) if any(cost) else "-"
        return (
            s.title, str(len(s.best)), _spread(s.best, loss), f"{s.solved}/{len(s.best)}", of_cost(s.cost),
            _spread(s.seconds, time), of_cost(cost), _spread(seconds, count),
        )  # fmt: skip

    return head, [row(s) for s in summary.standings]


def _spread(values: Sequence[float], form: Any) -> str:
    """The median, of an even number the higher one, and the extremes; infinity stands for never."""
    show = lambda v: form(v) if math.isfinite(v) else "never"
    ordered = sorted(values)
    middle, ends = show(ordered[len(ordered) // 2]), (show(ordered[0]), show(ordered[-1]))
    return middle if len(set(ends)) == 1 else f"{middle} ({ends[0]} to {ends[1]})"


def _tuning(entry: Entry, tuning: Results) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = []
    for side in entry.contestants():
        ranges = "; ".join(f"{name} {chosen}" for name, chosen in entry.ranges_of(side).items())
        tried = [f"{_words(r.options)}: {_shown(entry, r)}" for r in tuning[side.name]]
        rows.append((side.title, ranges or "none: its defaults", "cosine" if side.cosine else "", "; ".join(tried)))
    return ("contestant", "ranges", "schedule", "trials"), rows


def _words(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def _shown(entry: Entry, run: BenchRun) -> str:
    best = run.best(entry.measure)
    return short(entry.measure.shown(best)) if math.isfinite(best) else "none"


def _ranges(request: BenchRequest, entry: Entry) -> str:
    decay = "Weight decay is tuned for all." if entry.decay else "No weight decay, for all."
    return f"{request.trials} trials of {entry.trial_limits.budget:g} gradient-equivalents each. {decay}"


def _made(entry: Entry, runs: Sequence[BenchRun]) -> str:
    about = [run.record["about"] for run in runs]
    dates, loads = sorted(a["date"] for a in about), [float(a["load average"]) for a in about]
    items = [f"{key}: {' or '.join(sorted({a[key] for a in about}))}" for key in _MACHINE]
    items += [f"{len(runs)} runs, {dates[0]} to {dates[-1]}; {entry.clock.value} seconds"]
    items += [f"load average when a run began: {min(loads):g} to {max(loads):g} (above 1, others shared the machine)"]
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _curves(entry: Entry, runs: Results) -> str:
    names = [side for side in entry.contestants() if runs.get(side.name)]
    draws = [
        (f"{title} over {word}", partial(_panel, entry, runs, clock, column, f"{title} over {word}"))
        for column, title in (("train", "Training loss"), ("heldout", "Held-out loss"))
        for clock, word in CLOCKS.items()
    ]
    if entry.measure.column not in ("train", "heldout"):
        title = entry.measure.title[0].upper() + entry.measure.title[1:]
        draws += [
            (f"{title} over {word}", partial(_panel, entry, runs, clock, entry.measure.column, f"{title} over {word}"))
            for clock, word in CLOCKS.items()
        ]
    colours = legend([(side.title, f"var(--s{k % len(PAGE.series)})") for k, side in enumerate(names)])
    note = "A line for each seed; the seventh and further contestants are dashed."
    return section("Curves", colours + panels(draws, "curve"), note)


def _panel(entry: Entry, runs: Results, clock: str, column: str, title: str, axes: Axes, theme: Theme) -> None:
    """Every run's figure over a clock."""
    drawn: list[float] = []
    log = column in ("train", "heldout")
    for index, side in enumerate(s for s in entry.contestants() if runs.get(s.name)):
        color, dash = theme.series[index % len(theme.series)], "--" if index >= len(theme.series) else "-"
        for run in runs[side.name]:
            points = [(p[clock], p[column]) for p in run.points if p[column] is not None and (not log or p[column] > 0)]
            drawn += [y for _, y in points]
            axes.plot([x for x, _ in points], [y for _, y in points], dash, color=color, lw=1.8 if index == 0 else 1.0)
    if log and drawn:
        log_axis(axes, "y", decades=math.log10(max(drawn) / min(drawn)))
        axes.set_ylim(0.9 * min(drawn), min(max(drawn), 1e6 * min(drawn)) * 1.1)
    linear_axis(axes, "x", whole=clock == "cost")
    axes.set_xlim(left=0)
    axes.set(title=title, xlabel=CLOCKS[clock])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], first: Sequence[str] | None = None) -> str:
    """An HTML table, numbers to the right; `first` are HTML texts in place of each row's first cell."""
    kinds = ["" if all(map(_numeric, column)) else " class=text" for column in zip(*rows, strict=True)]
    kinds[0] = ""
    heads = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = ""
    for k, row in enumerate(rows):
        lead = first[k] if first is not None else escape(row[0])
        cells = "".join(
            f'<td{kind} data-head="{escape(name)}">{escape(cell)}</td>'
            for kind, name, cell in zip(kinds[1:], head[1:], row[1:], strict=True)
        )
        body += f"<tr><td>{lead}</td>{cells}</tr>"
    table = f'<table class="cards"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _numeric(cell: str) -> bool:
    return cell in ("never", "", "-") or (cell[0].isdigit() and " or " not in cell and " to " not in cell)
