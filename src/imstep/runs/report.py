"""The report of a comparison: one HTML page that needs nothing but itself, a PNG and the JSON record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from imstep.runs import plots
from imstep.runs.anatomy import anatomy_panels, status_color, status_counts
from imstep.runs.files import write_atomically, write_json
from imstep.runs.page import legend, page, panels, section
from imstep.runs.records import Comparison, Run, Sweep, SweepRow
from imstep.runs.surfaces import surface_panels
from imstep.runs.theme import PAGE, save_png
from imstep.runs.verdict import short

__all__ = ["ReportFiles", "render", "save_report"]

HEADS = ("lowest train loss", "final train", "final held-out", "lowest held-out", "steps", "epochs",
         "gradient-equivalents", "products", "seconds")  # fmt: skip


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    page: Path
    picture: Path
    record: Path


def save_report(comparison: Comparison, out: Path) -> ReportFiles:
    """Write `report.html`, `summary.png` and `comparison.json` into `out` (made if it is not there)."""
    out.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(out / "report.html", out / "summary.png", out / "comparison.json")
    # The record comes first: should drawing fail, the measurement is not lost.
    write_json(files.record, comparison.to_dict())
    save_png(partial(plots.summary_figure, comparison), files.picture)
    write_atomically(files.page, render(comparison).encode())
    return files


def render(comparison: Comparison) -> str:
    """The page as HTML text: inline SVG, no script, no external asset, in the reader's light or dark mode."""
    sections = [
        _verdict(comparison),
        _table(comparison),
        _curves(comparison),
        _anatomy(comparison),
        _tuning(comparison),
        _pictures(comparison),
        _surfaces(comparison),
        _settings(comparison),
    ]
    body = "\n".join(section for section in sections if section)
    lead = (
        f"{comparison.description} {comparison.parameters:,} parameters, the same initial weights for all, "
        f"{comparison.budget:,.0f} gradient-equivalents each."
    )
    return page(comparison.title, f"imstep compare {comparison.task}", lead, body)


def _verdict(comparison: Comparison) -> str:
    verdict = comparison.verdict
    factor = f"{verdict.factor:.0f}×" if verdict.factor >= 10 else f"{verdict.factor:.2g}×"
    caption = (
        "lower training loss<br>than the next best" if verdict.won else "above the lowest<br>training loss"
    )
    details = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.details)
    return f"""<section class="verdict {"won" if verdict.won else "lost"}">
<div class="figure">{factor}<small>{caption}</small></div>
<p class="headline">{escape(verdict.headline)}</p>
<ul>{details}</ul>
</section>"""


def _table(comparison: Comparison) -> str:
    best = min(range(len(comparison.runs)), key=lambda i: _sortable(comparison.runs[i].best.train))
    rows = "".join(_table_row(run, index, index == best) for index, run in enumerate(comparison.runs))
    head = "<th>optimizer</th>" + "".join(f"<th>{name}</th>" for name in HEADS)
    head += "<th class=text>how steps ended</th>"
    note = (
        "A forward and backward pass over the training set costs 1 gradient-equivalent, a loss 1/3, a "
        "recorded gradient 4/3, a replayed Hessian product 2, a Gauss-Newton product 4/3. Work that is not "
        "a pass over the data, such as factorising a preconditioner, shows in the seconds only. A step that "
        "would exceed the budget does not count, and evaluations are not charged. An epoch draws every batch "
        "once; one step of L-BFGS or NewtonKrylov passes over its batch several times. Seconds are those of "
        "the chosen setting's steps, without the sweeps."
    )
    table = f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return section("Result", f'<div class="scroll">{table}</div>', note)


def _sortable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _table_row(run: Run, index: int, best: bool) -> str:
    end = run.final
    ended = [f"{name.replace('_', ' ')} {count}" for name, count in status_counts(run)]
    ended += [run.note] if run.note else []
    numbers = [
        short(run.best.train, 3), short(end.train, 3), short(end.heldout, 3), short(run.stopped.heldout, 3),
        f"{end.steps:,}", f"{end.epochs:,.0f}", f"{end.cost:,.0f}",
        f"{run.products:,}" if run.products else "–", f"{end.seconds:.1f}",
    ]  # fmt: skip
    # On a phone a row becomes a card, and its entries need their heads.
    cells = "".join(f'<td data-head="{head}">{number}</td>' for head, number in zip(HEADS, numbers, strict=True))
    name = _dot(_color(index)) + escape(run.label)
    mark = ' class="best"' if best else ""
    how = escape(", ".join(ended)) or "–"
    return f'<tr{mark}><td>{name}</td>{cells}<td class="text" data-head="how steps ended">{how}</td></tr>'


def _dot(color: str) -> str:
    return f'<span class="dot" style="background: {color}"></span>'


def _color(index: int) -> str:
    return f"var(--s{index % len(PAGE.series)})"


def _curves(comparison: Comparison) -> str:
    note = (
        "Training loss over the whole training set, measured outside the clock: first over work, then over time on "
        "this machine."
    )
    clocks = ("cost", "seconds")
    draws = [(f"Training loss over {clock}", partial(plots.loss_panel, comparison, clock)) for clock in clocks]
    names = legend([(run.label, _color(index)) for index, run in enumerate(comparison.runs)])
    return section("Loss curves", names + panels(draws, "loss"), note)


def _anatomy(comparison: Comparison) -> str:
    run = next((run for run in comparison.runs if run.anatomy), None)
    if run is None:
        return ""
    counts = status_counts(run)
    bar = "".join(
        f'<span style="flex: {count}; background: {_page_color(name)}"></span>' for name, count in counts
    )
    chips = "".join(
        f"<li>{_dot(_page_color(name))}{escape(name.replace('_', ' '))} <b>{count}</b></li>"
        for name, count in counts
    )
    note = (
        f"{run.label}: every one of its {len(run.anatomy)} steps within the budget. The inner solve ends as "
        "soon as a direction cannot be trusted or the next product no longer pays; the monitor compares the "
        "loss with its quadratic model and sets the step length. Grey band: rho between 1/4 and 3/4, where "
        "damping stays as it is; values beyond the axis are drawn at its border."
    )
    picture = panels(anatomy_panels(run), "anatomy")
    content = f'<div class="bar">{bar}</div><ul class="chips">{chips}</ul>{picture}'
    return section("Anatomy of the Newton steps", content, escape(note))


def _page_color(status: str) -> str:
    """The status's colour as the page's CSS variable."""
    color = status_color(PAGE, status)
    names = {PAGE.good: "good", PAGE.warn: "warn", PAGE.bad: "bad", PAGE.muted: "muted"}
    return f"var(--{names.get(color) or f's{PAGE.series.index(color)}'})"


def _tuning(comparison: Comparison) -> str:
    heldout = ("Held-out loss over cost", partial(plots.heldout_panel, comparison))
    if not comparison.sweeps:
        return section("Held-out loss", panels([heldout], "heldout"))
    chart = ("Loss over learning rate", partial(plots.sweep_panel, comparison))
    edge = [sweep.optimizer for sweep in comparison.sweeps if sweep.at_the_edge]
    tuned = {sweep.optimizer for sweep in comparison.sweeps}
    subject = comparison.runs[0]
    alone = not any(subject.label.startswith(title) for title in tuned)
    untuned = f" {subject.label} ran once, with its defaults." if alone else ""
    warning = (
        f" The best rate of {' and '.join(edge)} is at the edge of the grid: try further rates."
        if edge
        else ""
    )
    note = (
        f"Each rate had the full {comparison.sweeps[0].budget:,.0f} gradient-equivalents; the lowest "
        f"training loss was chosen and is shown above.{untuned}{warning}"
    )
    tables = "".join(_sweep_table(sweep) for sweep in comparison.sweeps)
    content = f'{panels([chart, heldout], "tuning")}<div class="panels">{tables}</div>'
    return section("Tuning of the baselines, and held-out loss", content, escape(note))


def _sweep_table(sweep: Sweep) -> str:
    rows = "".join(_sweep_row(row, row == sweep.chosen) for row in sweep.rows)
    head = f"<th>{escape(sweep.optimizer)}: lr</th><th>lowest train loss</th><th>seconds</th><th></th>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _sweep_row(row: SweepRow, chosen: bool) -> str:
    mark, word = (" class=chosen", "chosen") if chosen else ("", "")
    numbers = f"<td>{row.options['lr']:g}</td><td>{short(row.loss, 3)}</td><td>{row.seconds:.1f}</td>"
    return f"<tr{mark}>{numbers}<td class=text>{escape(row.note or word)}</td></tr>"


def _pictures(comparison: Comparison) -> str:
    if not comparison.originals:
        return ""
    shown = plots.shown_pictures(comparison)
    picture = "".join(_strip(label, pictures, index) for label, pictures, index in shown)
    note = "Pictures that no optimizer trained on, as each final network reconstructs them."
    return section("Held-out reconstructions", picture, note)


def _strip(label: str, pictures: Sequence[Any], index: int | None) -> str:
    """Pictures side by side, with what made them."""
    name, _, more = label.partition("\n")
    dot = "" if index is None else _dot(_color(index))
    words = f"{dot}{escape(name)}" + (f"<small>{escape(more)}</small>" if more else "")
    drawn = plots.strip(pictures)
    return f'<div class="strip"><div>{words}</div><img alt="pictures, {escape(name)}" src="{drawn}"></div>'


def _surfaces(comparison: Comparison) -> str:
    found = [(run.label, run.surface) for run in comparison.runs if run.surface is not None]
    if comparison.solution is None or not found:
        return ""
    solution, *rest = surface_panels(comparison.solution, found)
    pairs = [rest[at : at + 2] for at in range(0, len(rest), 2)]
    picture = "".join(panels(part, f"surfaces{at}-") for at, part in enumerate([[solution], *pairs]))
    note = "What each final network makes of the solution, and where it is wrong; each error in its own scale."
    return section("Solution", picture, note)


def _settings(comparison: Comparison) -> str:
    batch = "full batch" if comparison.batch_size is None else f"{comparison.batch_size} examples a step"
    entries = {
        "seed": str(comparison.seed),
        "batch": f"{batch} unless the optimizer's name says otherwise",
        "wall time": f"{comparison.seconds:.0f} s for all runs and sweeps",
        **{run.label: _options(run) for run in comparison.runs},
        **comparison.environment,
    }
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    note = (
        "One seed and one machine: losses repeat with the same versions and threads, seconds do not. "
        "All numbers of this page are in comparison.json."
    )
    return section("Settings and versions", f"{command}<dl>{items}</dl>", note)


def _options(run: Run) -> str:
    shown = {key: value for key, value in run.options.items() if value is not None}
    words = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    ]
    return ", ".join(words) or "defaults"
