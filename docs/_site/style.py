"""The look of the site's pictures: white ground, few colours, and the same file from the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parents[1] / "images"
INK, MUTED, LINE = "#1d2330", "#667085", "#d9dee7"
RED, BLUE, GREEN, VIOLET, BROWN = "#c8441b", "#2b6cb0", "#1f9e89", "#7a4fbf", "#8a6d1d"

Draw = Callable[[Figure], None]

matplotlib.rcParams.update({
    "font.size": 10, "text.color": INK, "lines.linewidth": 1.8, "legend.frameon": False, "svg.hashsalt": "imstep",
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "xtick.color": MUTED, "ytick.color": MUTED,
})  # fmt: skip


def save(name: str, draw: Draw, size: tuple[float, float] = (6.0, 2.7)) -> None:
    """Draw a picture and write it to images/NAME.svg."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    draw(figure)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    print(f"images/{name}.svg")


def bare(axes: Axes) -> None:
    """No ticks, no grid: for sketches."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
