"""The curvature along a run: sharpness beside the edge of stability, trace, density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from imstep.runs.page import panels, section
from imstep.runs.spectrum_report import draw_density
from imstep.runs.theme import Theme, linear_axis

__all__ = ["watched_section"]

Rows = Sequence[Mapping[str, Any]]


def watched_section(rows: Rows) -> str:
    """The part of a run's page about its curvature; empty where it was not watched."""
    watched = [row for row in rows if row["kind"] == "curvature" and row["largest"] is not None]
    if not watched:
        return ""
    note = "The Hessian of the mean training loss, over the whole training set, in evaluation mode. "
    if any(row["edge"] is not None for row in watched):
        note += (
            "Above the dashed line gradient descent with the full batch grows along the sharpest direction; it often "
            "settles there (Cohen et al., arXiv 2103.00065)."
        )
    else:
        note += "The optimizer is no gradient descent, whose edge of stability is at 2 / learning rate."
    draws = [
        ("Sharpness over the steps", partial(_sharpness, watched)),
        ("Trace over the steps", partial(_trace, watched)),
        ("Density of the eigenvalues", partial(_density, watched)),
    ]
    return section("Curvature", panels(draws, "curvature"), note)


def _sharpness(rows: Rows, axes: Axes, theme: Theme) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["largest"] for row in rows], "o-", ms=3, color=theme.series[0], label="largest eigenvalue")
    edges = [(row["step"], row["edge"]) for row in rows if row["edge"] is not None]
    if edges:
        x, y = zip(*edges, strict=True)
        axes.plot(x, y, color=theme.ink, lw=1.2, ls=(0, (4, 3)), label="edge of stability")
        axes.legend(loc="best", fontsize=8)
    _finish("Largest eigenvalue over the steps", "largest eigenvalue", axes)


def _trace(rows: Rows, axes: Axes, theme: Theme) -> None:
    told = [row for row in rows if row["trace"] is not None]
    axes.errorbar(
        [row["step"] for row in told], [row["trace"] for row in told],
        yerr=[row["trace_error"] or 0.0 for row in told], fmt="o-", ms=3, lw=1.4, color=theme.series[1],
    )  # fmt: skip
    _finish("Trace over the steps", "trace", axes)


def _density(rows: Rows, axes: Axes, theme: Theme) -> None:
    """At the start, in the middle and at the end."""
    known = lambda row: all(value is not None and math.isfinite(value) for value in row["density"]["values"])
    drawn = [row for row in rows if known(row)]
    picked = [drawn[at] for at in sorted({0, len(drawn) // 2, len(drawn) - 1})] if drawn else []
    draw_density([(f"step {row['step']:,}", row["density"]) for row in picked], axes, theme)
    if picked:
        axes.legend(loc="best", fontsize=8)


def _finish(title: str, unit: str, axes: Axes) -> None:
    linear_axis(axes, "x", whole=True)
    linear_axis(axes, "y")
    axes.set(title=title, xlabel="step", ylabel=unit)
