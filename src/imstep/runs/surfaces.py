"""A figure of a solution, of what networks make of it, and of where they are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imstep.runs.theme import Theme
from imstep.runs.verdict import short
from imstep.tasks import Surface

__all__ = ["surfaces_figure"]


def surfaces_figure(solution: Surface, found: Sequence[tuple[str, Surface]], theme: Theme) -> Figure:
    """The solution and each network's in the first row, the absolute errors below, each in its own scale.

    Args:
        solution: what the networks are compared with.
        found: (label, network).
        theme: colours.
    """
    columns = 1 + len(found)
    figure = Figure(figsize=(max(2.1 * columns, 4.2), 3.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    exact = np.asarray(solution.values, dtype=float)
    limits = (float(exact.min()), float(exact.max()))
    _image(grid[0][0], solution, exact, "solution", "RdBu_r", limits)
    grid[1][0].set_axis_off()
    grid[1][0].text(0.5, 0.5, "absolute error", color=theme.muted, ha="center", transform=grid[1][0].transAxes)
    for column, (label, surface) in enumerate(found, 1):
        values = np.asarray(surface.values, dtype=float)
        error = np.abs(values - exact)
        _image(grid[0][column], surface, values, label, "RdBu_r", limits)
        most = float(np.nanmax(error)) if np.isfinite(error).any() else 1.0
        _image(grid[1][column], surface, error, f"at most {short(most, 2)}", "magma", (0.0, most or 1.0))
    for axes in grid[1][1:]:
        axes.set_xlabel(solution.axes[0])
    grid[0][0].set_ylabel(solution.axes[1])
    return figure


def _image(
    axes: Axes, surface: Surface, values: np.ndarray, title: str, colors: str, limits: tuple[float, float]
) -> None:
    (left, right), (bottom, top) = surface.extent
    axes.imshow(
        values, origin="lower", extent=(left, right, bottom, top), aspect="auto", cmap=colors, vmin=limits[0],
        vmax=limits[1], interpolation="bilinear",
    )  # fmt: skip
    axes.grid(False)
    axes.set_title(title, fontsize=9)
