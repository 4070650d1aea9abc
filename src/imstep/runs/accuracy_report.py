"""The accuracy sweep as a figure and as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imstep.runs.accuracy import AccuracyResult, Curve
from imstep.runs.files import write_json
from imstep.runs.subjects import NETWORKS
from imstep.runs.theme import Theme, log_axis, power_label, save_png

__all__ = ["accuracy_figure", "save_accuracy"]

_BREAK = 20.0
_METHOD_MARKS = {"complex step": "o", "central difference": "s", "forward difference": "^"}


def accuracy_figure(result: AccuracyResult, theme: Theme) -> Figure:
    """Relative error over h, log-log: one panel per network and precision."""
    known = {network.name: network.title for network in NETWORKS}
    panels = list(dict.fromkeys((curve.network, curve.dtype) for curve in result.curves))
    rows = len({network for network, _ in panels})
    columns = len(panels) // rows
    figure = Figure(figsize=(5.3 * columns, 3.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (network, dtype) in zip(grid.flat, panels, strict=True):
        _accuracy_panel(axes, result.select(network, dtype), theme)
        axes.set_title(f"{known.get(network, network)}, {dtype}")
    for row in grid:
        row[0].set_ylabel("relative error of the product")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=10)
    return figure


def _accuracy_panel(axes: Axes, curves: Sequence[Curve], theme: Theme) -> None:
    for index, curve in enumerate(curves):
        # An error of exactly zero has no place on a logarithmic axis: a hundredth of roundoff stands for it.
        pairs = [
            (-math.log10(h), max(e, 1e-18))
            for h, e in zip(curve.steps, curve.errors, strict=True)
            if e is not None
        ]
        x, y = zip(*pairs, strict=True) if pairs else ((), ())
        mark, width = _METHOD_MARKS.get(curve.method, "o"), 2.4 if index == 0 else 1.4
        look: dict[str, Any] = {"ms": 3.6, "lw": width, "color": theme.series[index], "zorder": 5 - index}
        axes.plot(x, y, f"-{mark}", label=curve.method, **look)
        if index == 0 and curve.plateau is not None:
            text = f"{math.floor(curve.plateau.decades + 1e-9)} decades at rounding level"
            at = (0.62, curve.plateau.worst_error)
            axes.annotate(
                text, at, xycoords=axes.get_yaxis_transform(), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=9.5, color=theme.series[0],
            )  # fmt: skip
    log_axis(axes, "y", decades=9)
    axes.set_ylim((1e-17, 1e2) if "64" in curves[0].dtype else (1e-8, 1e2))
    _step_axis(axes, max(-math.log10(h) for curve in curves for h in curve.steps), theme)


def _step_axis(axes: Axes, last: float, theme: Theme) -> None:
    """Decades of h to the right; beyond 1e-20 of 300 decades, 16 take the room of one, and it says so."""
    shown = [1, 5, 10, 15, 20]
    if last > 40:
        axes.set_xscale("function", functions=(_compress, _expand))
        axes.axvline(_BREAK, color=theme.muted, lw=0.9, ls=(0, (2, 3)))
        shown += [100, 200, 300]
    else:
        shown += [25, 30, 38]
    axes.set_xlim(0.5, last * 1.02)
    axes.set_xticks(shown, [power_label(10.0**-d) for d in shown])
    axes.set_xlabel("step h (compressed beyond 10⁻²⁰)" if last > 40 else "step h")


def _compress(decades: np.ndarray) -> np.ndarray:
    return np.where(decades <= _BREAK, decades, _BREAK + (decades - _BREAK) / 16)


def _expand(position: np.ndarray) -> np.ndarray:
    return np.where(position <= _BREAK, position, _BREAK + (position - _BREAK) * 16)


def save_accuracy(result: AccuracyResult, out: Path) -> tuple[Path, Path]:
    """Write `accuracy.json` and `accuracy.png` into `out` (made if it is not there); returns both paths.

    JSON: format, seed, environment, reference, plateau_tolerance, curves: a list of {network, dtype, method,
    steps: [h], errors: [relative error or null], best: {h, error}, plateau: {largest_h, smallest_h,
    worst_error, decades} or null}.
    """
    out.mkdir(parents=True, exist_ok=True)
    record, figure = out / "accuracy.json", out / "accuracy.png"
    write_json(record, result.to_dict())
    save_png(partial(accuracy_figure, result), figure)
    return record, figure
