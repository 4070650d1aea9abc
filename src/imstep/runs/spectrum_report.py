"""The report of a spectrum: a page and a picture with density, eigenvalues and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imstep.runs.files import write_atomically
from imstep.runs.page import legend, page, panels, section
from imstep.runs.spectra import Point
from imstep.runs.theme import Theme, linear_axis, log_axis, save_png
from imstep.runs.verdict import short

if TYPE_CHECKING:
    from imstep.runs.spectrum import Spectrum

__all__ = ["draw_density", "save_spectrum", "shown_points"]

Draw = Callable[[Axes, Theme], None]

_LINES = 5
"""Points drawn beside each other at most."""

_DEPTH = 1e-6
"""Least density that is drawn, relative to the highest: below it is the smoothing's own tail."""

_NAMES = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton matrix", "fisher": "Fisher matrix"}


def save_spectrum(record: Spectrum, out: Path) -> tuple[Path, Path]:
    """Write a self-contained `report.html` and `spectrum.png` into a folder; where they are."""
    draws = _draws(record)
    picture, file = out / "spectrum.png", out / "report.html"
    save_png(partial(_summary, record, draws), picture)
    write_atomically(file, _render(record, draws).encode())
    return file, picture


def _title(record: Spectrum) -> str:
    return f"{record.title}: the {_NAMES[record.questions.of]}"


def _render(record: Spectrum, draws: Sequence[tuple[str, Draw]]) -> str:
    asked = record.questions
    lead = (
        f"{_NAMES[asked.of]} of the mean loss over the training set, {record.parameters:,} parameters, in evaluation "
        "mode. Bands and ± hold the truth in 95 % of cases; each eigenvalue has its residual."
    )
    shown = shown_points(record.points)
    chips = legend([(_label(point), f"var(--s{at})") for at, point in enumerate(shown)]) if len(shown) > 1 else ""
    facts = {**{k: str(v) for k, v in vars(asked).items()}, "command": record.command, **record.environment}
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    sections = [
        section("Spectrum", chips + panels(draws, "spectrum")),
        section("Numbers", _table(record)),
        section("Settings", f"<dl>{entries}</dl>"),
    ]
    return page(_title(record), "imstep spectrum", lead, "\n".join(sections))


def _table(record: Spectrum) -> str:
    head = "<th>step</th><th>loss</th><th>trace</th><th class=text>eigenvalues of largest magnitude</th>"
    rows = ""
    for point in record.points:
        trace, values = point.answers["trace"], point.answers["eigenvalues"]["values"]
        cells = [
            "-" if point.step is None else str(point.step), short(point.loss),
            f"{short(trace['value'])} ± {trace['error']:.1g}",
        ]  # fmt: skip
        shown = ", ".join(f"{value:.4g}" for value in values[:10])
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td class=text>{shown}</td></tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _draws(record: Spectrum) -> list[tuple[str, Draw]]:
    points = record.points
    densities = [(_label(point), point.answers["density"]) for point in shown_points(points)]
    draws: list[tuple[str, Draw]] = [
        ("Density of the eigenvalues", partial(draw_density, densities)),
        ("Eigenvalues of largest magnitude", partial(_eigenvalues, shown_points(points))),
    ]
    if len(points) > 1:
        draws.append(("Largest eigenvalue and trace by step", partial(_by_step, points)))
    if "layers" in points[-1].answers:
        draws.append(("Trace by layer", partial(_layers, shown_points(points))))
    return draws


def _summary(record: Spectrum, draws: Sequence[tuple[str, Draw]], theme: Theme) -> Figure:
    figure = Figure(figsize=(5.2 * len(draws), 3.9), layout="constrained")
    figure.suptitle(_title(record), x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axes, (_, draw) in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes, theme)
    if len(record.points) > 1:
        figure.axes[0].legend(loc="best", fontsize=8)
    return figure


def shown_points(points: Sequence[Point]) -> list[Point]:
    """At most five, evenly among all, the first and the last included."""
    count = min(_LINES, len(points))
    places = [round(at * (len(points) - 1) / max(1, count - 1)) for at in range(count)]
    return [points[at] for at in places]


def _label(point: Point) -> str:
    return "now" if point.step is None else f"step {point.step:,}"


def draw_density(densities: Sequence[tuple[str, Any]], axes: Axes, theme: Theme) -> None:
    """Densities with their bands, one over the other: (label, {"grid", "values", "error"})."""
    drawn = [(label, d) for label, d in densities if all(math.isfinite(x) for x in d["values"])]
    highest = max((max(d["values"]) for _, d in drawn), default=1.0) or 1.0
    floor = _DEPTH * highest
    for at, (label, d) in enumerate(drawn):
        color = theme.series[at % len(theme.series)]
        pairs = list(zip(d["values"], d["error"], strict=True))
        low, high = [max(v - e, floor) for v, e in pairs], [max(v + e, floor) for v, e in pairs]
        axes.fill_between(d["grid"], low, high, color=color, alpha=0.22, lw=0)
        axes.plot(d["grid"], [max(v, floor) for v, _ in pairs], color=color, lw=1.4, label=label)
    axes.axvline(0.0, color=theme.muted, lw=0.8, ls=(0, (4, 3)))
    log_axis(axes, "y", decades=6)
    linear_axis(axes, "x")
    axes.set_ylim(bottom=floor)
    axes.set(title="Density of the eigenvalues", xlabel="eigenvalue", ylabel="density")


def _eigenvalues(points: Sequence[Point], axes: Axes, theme: Theme) -> None:
    for at, point in enumerate(points):
        found, color = point.answers["eigenvalues"], theme.series[at % len(theme.series)]
        x = range(1, len(found["values"]) + 1)
        axes.errorbar(
            x, found["values"], yerr=found["residual_norms"], fmt="o", ms=4, lw=1, color=color, label=_label(point)
        )
    axes.axhline(0.0, color=theme.muted, lw=0.8, ls=(0, (4, 3)))
    linear_axis(axes, "x", whole=True)
    linear_axis(axes, "y")
    axes.set(title="Eigenvalues of largest magnitude", xlabel="number", ylabel="eigenvalue")


def _by_step(points: Sequence[Point], axes: Axes, theme: Theme) -> None:
    steps = [point.step or 0 for point in points]
    traces = [point.answers["trace"] for point in points]
    largest = [point.answers["eigenvalues"]["largest"] for point in points]
    axes.plot(steps, largest, "o-", ms=3.5, color=theme.series[0], label="largest")
    axes.errorbar(
        steps, [t["value"] for t in traces], yerr=[t["error"] for t in traces], fmt="o-", ms=3.5, color=theme.series[1],
        label="trace",
    )  # fmt: skip
    linear_axis(axes, "x", whole=True)
    values = [*largest, *(t["value"] for t in traces)]
    if all(0 < value < math.inf for value in values):
        log_axis(axes, "y", decades=math.log10(max(values) / min(values)))
    axes.legend(loc="best", fontsize=8)
    axes.set(title="Largest eigenvalue and trace by step", xlabel="step", ylabel="")


def _layers(points: Sequence[Point], axes: Axes, theme: Theme) -> None:
    names = list(points[-1].answers["layers"]["by"])
    height = 0.8 / len(points)
    for at, point in enumerate(points):
        layers = point.answers["layers"]["by"]
        axes.barh(
            [row + at * height for row in range(len(names))], [layers[name]["trace"] for name in names], height,
            xerr=[layers[name]["error"] for name in names], color=theme.series[at % len(theme.series)],
            ecolor=theme.muted, align="edge",
        )  # fmt: skip
    axes.set_yticks([row + 0.4 for row in range(len(names))], names)
    axes.invert_yaxis()
    linear_axis(axes, "x")
    axes.set(title="Trace by layer", xlabel="trace")
