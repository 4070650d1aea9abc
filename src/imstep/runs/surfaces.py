"""Plots of a solution, of what networks make of it, and of where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from imstep.runs.theme import Theme
from imstep.runs.verdict import short
from imstep.tasks import Surface

__all__ = ["surface_panels"]


def surface_panels(
    solution: Surface, found: Sequence[tuple[str, Surface]]
) -> list[tuple[str, Callable[[Axes, Theme], None]]]:
    """The solution; then each network beside its absolute error, which has a scale of its own.

    Args:
        solution: what the networks are compared with.
        found: (label, network).
    """
    exact = np.asarray(solution.values, dtype=float)
    limits = (float(exact.min()), float(exact.max()))
    panels = [("Solution", partial(_image, solution, exact, "solution", solution.colors, limits))]
    for label, surface in found:
        values = np.asarray(surface.values, dtype=float)
        error = np.abs(values - exact)
        most = float(np.nanmax(error)) if np.isfinite(error).any() else 1.0
        words = f"absolute error, at most {short(most, 2)}"
        panels.append((label, partial(_image, surface, values, label, solution.colors, limits)))
        panels.append((f"Error of {label}", partial(_image, surface, error, words, "magma", (0.0, most or 1.0))))
    return list(panels)


def _image(
    surface: Surface,
    values: np.ndarray,
    title: str,
    colors: str,
    limits: tuple[float, float],
    axes: Axes,
    theme: Theme,
) -> None:
    (left, right), (bottom, top) = surface.extent
    shown = axes.imshow(
        values, origin="lower", extent=(left, right, bottom, top), aspect="auto", cmap=colors, vmin=limits[0],
        vmax=limits[1], interpolation="bilinear",
    )  # fmt: skip
    axes.grid(False)
    axes.set(title=title, xlabel=surface.axes[0], ylabel=surface.axes[1])
    scale = axes.figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.02)
    scale.outline.set_visible(False)
