"""The figures of a comparison. Each function draws for a theme; nothing is written here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from imstep.runs.records import Comparison, Point, Sweep
from imstep.runs.theme import Theme, linear_axis, log_axis
from imstep.runs.verdict import short

__all__ = ["heldout_panel", "loss_panel", "shown_pictures", "strip", "summary_figure", "sweep_panel"]


def loss_panel(comparison: Comparison, clock: str, axes: Axes, theme: Theme) -> None:
    """Training loss over `clock`, "cost" or "seconds": one line per optimizer."""
    _curves(comparison, clock, "train", axes, theme, ms=4.5)
    if clock == "cost":
        axes.set(title="Training loss by cost", xlabel="gradient-equivalents", ylabel="training loss")
    else:
        axes.set(title="Training loss by the clock", xlabel="seconds in steps", ylabel="training loss")


def heldout_panel(comparison: Comparison, axes: Axes, theme: Theme) -> None:
    """Held-out loss over gradient-equivalents."""
    _curves(comparison, "cost", "heldout", axes, theme, ms=4.0)
    axes.set(title="Held-out loss by cost", xlabel="gradient-equivalents", ylabel="held-out loss")


def _curves(comparison: Comparison, clock: str, loss: str, axes: Axes, theme: Theme, ms: float) -> None:
    """One line per optimizer, with a dot of size ``ms`` at its end."""
    series = [_series(run.points, clock, loss) for run in comparison.runs]
    for index, (run, (x, y)) in enumerate(zip(comparison.runs, series, strict=True)):
        color = theme.series[index % len(theme.series)]
        axes.plot(x, y, color=color, label=run.label, **_emphasis(index))
        axes.plot(x[-1:], y[-1:], "o", ms=ms, color=color, zorder=5)
    _loss_axis(axes, [value for _, y in series for value in y])
    linear_axis(axes, "x", whole=clock == "cost")
    axes.set_xlim(left=0)


def sweep_panel(comparison: Comparison, axes: Axes, theme: Theme) -> None:
    """Lowest training loss over the learning rate for every tuned baseline; the subject's loss as a line."""
    losses: list[float] = []
    for sweep in comparison.sweeps:
        color = theme.series[_index_of(comparison, sweep) % len(theme.series)]
        rows = [(row.options["lr"], row.loss) for row in sweep.rows if math.isfinite(row.loss)]
        rates, values = zip(*sorted(rows), strict=True) if rows else ((), ())
        losses += values
        axes.plot(rates, values, "-", color=color, lw=1.4)
        axes.plot(rates, values, "o", ms=5, mfc=theme.paper, mec=color, mew=1.4)
        chosen = sweep.chosen
        axes.plot([chosen.options["lr"]], [chosen.loss], "o", ms=7, color=color, label=sweep.optimizer)
    subject = comparison.runs[0].best.train
    if math.isfinite(subject):
        losses.append(subject)
        axes.axhline(subject, color=theme.series[0], lw=1.2, ls=(0, (4, 3)), label=comparison.runs[0].label)
    _loss_axis(axes, losses)
    log_axis(axes, "x", decades=3)
    rates_tried = sorted({row.options["lr"] for sweep in comparison.sweeps for row in sweep.rows})
    axes.set_xticks(rates_tried, [f"{rate:g}" for rate in rates_tried])
    axes.margins(x=0.08)
    axes.set(
        title="Learning rates tried (full budget each)", xlabel="learning rate; filled: chosen",
        ylabel="lowest training loss",
    )  # fmt: skip
    if losses:
        axes.legend(loc="best", fontsize=8)


def _index_of(comparison: Comparison, sweep: Sweep) -> int:
    """The run that the sweep chose: its label begins with the sweep's title and its rate agrees."""
    rate = sweep.chosen.options.get("lr")
    matches = (
        index
        for index, run in enumerate(comparison.runs)
        if run.label.startswith(sweep.optimizer + ", lr") and run.options.get("lr") == rate
    )
    return next(matches, len(comparison.runs))


def shown_pictures(comparison: Comparison) -> list[tuple[str, Sequence[Any], int | None]]:
    """Rows of pictures: label, pictures, colour index."""
    rows: list[tuple[str, Sequence[Any], int | None]] = [("original", comparison.originals, None)]
    for index, run in enumerate(comparison.runs):
        if run.pictures:
            rows.append((f"{run.label}\nheld-out loss {short(run.final.heldout)}", run.pictures, index))
    return rows


def strip(pictures: Sequence[Any]) -> str:
    """Pictures side by side as one PNG, in a `data:` address."""
    tall = [np.pad(np.asarray(picture), ((0, 0), (0, 1)), constant_values=-1) for picture in pictures]
    joined = np.concatenate(tall, 1)[:, :-1]
    # Gray and opacity: what lies between two pictures is the page.
    colors = np.stack([joined.clip(0)] * 3 + [np.where(joined < 0, 0, 255)], 2).astype(np.uint8)
    buffer = io.BytesIO()
    imsave(buffer, colors, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture_grid(figure: Any, shown: Sequence[tuple[str, Sequence[Any], int | None]], theme: Theme) -> None:
    """One row of pictures per entry of `shown` (label, pictures, colour index), labels on the left."""
    columns = len(shown[0][1])
    gap = {"wspace": 0.08, "hspace": 0.08, "left": 0.2, "right": 1.0, "top": 1.0, "bottom": 0.0}
    grid = figure.subplots(len(shown), columns, squeeze=False, gridspec_kw=gap)
    for row, (label, pictures, index) in enumerate(shown):
        for axes, picture in zip(grid[row], pictures, strict=True):
            axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
        color = theme.muted if index is None else theme.series[index % len(theme.series)]
        # One text per line: the page's narrower font would shift the lines of a block against each other.
        lines, first = label.split("\n"), grid[row][0]
        for height, line in zip((0.5,) if len(lines) == 1 else (0.62, 0.34), lines, strict=True):
            first.text(-0.2, height, line, color=color, ha="right", va="center", transform=first.transAxes)


def summary_figure(comparison: Comparison, theme: Theme) -> Figure:
    """One picture of the whole: verdict, loss curves, learning rates, reconstructions."""
    shown = shown_pictures(comparison)
    rows = 0.83 * len(shown) if comparison.originals else 0.0
    figure = Figure(figsize=(12.5, 5.1 + rows))
    heights = [0.75, 4.2, rows] if rows else [0.75, 4.2]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.05, squeeze=False)
    head, body = parts[0, 0], parts[1, 0]
    head.text(0.05, 0.72, comparison.title, fontsize=15, fontweight="bold", va="center")
    head.text(0.05, 0.18, _wrapped(comparison.verdict.headline), fontsize=10, color=theme.muted, va="center")
    margins = {"left": 0.05, "right": 0.985, "bottom": 0.14, "top": 0.84}
    left, middle, right = body.subplots(1, 3, gridspec_kw=margins)
    loss_panel(comparison, "cost", left, theme)
    loss_panel(comparison, "seconds", middle, theme)
    sweep_panel(comparison, right, theme)
    middle.set(ylabel="", ylim=left.get_ylim())
    body.legend(*left.get_legend_handles_labels(), loc="upper center", ncols=6, bbox_to_anchor=(0.36, 1.01))
    if rows:
        _picture_grid(parts[2, 0], shown, theme)
    return figure


def _wrapped(text: str, width: int = 150) -> str:
    """At most two lines, broken at a space near the middle if one line is too long."""
    if len(text) <= width:
        return text
    middle = text.rfind(" ", 0, len(text) // 2 + 20)
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def _emphasis(index: int) -> dict[str, Any]:
    """The subject is drawn thicker and on top."""
    return {"lw": 2.6, "zorder": 4} if index == 0 else {"lw": 1.6, "zorder": 3}


def _series(points: Iterable[Point], x: str, y: str) -> tuple[list[float], list[float]]:
    """Coordinates of the finite, positive points."""
    pairs = [(getattr(point, x), getattr(point, y)) for point in points]
    drawn = [(a, b) for a, b in pairs if math.isfinite(b) and b > 0]
    return [a for a, _ in drawn], [b for _, b in drawn]


def _loss_axis(axes: Axes, losses: Iterable[float]) -> None:
    positive = [loss for loss in losses if math.isfinite(loss) and loss > 0]
    if positive:
        log_axis(axes, "y", decades=math.log10(max(positive) / min(positive)))
