"""The look of the figures, and how one becomes a PNG or an SVG in the page's light or dark mode.

A figure is drawn with placeholder colours; in an SVG each placeholder becomes a CSS variable of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

__all__ = [
    "DARK",
    "LIGHT",
    "PAGE",
    "Theme",
    "css_variables",
    "linear_axis",
    "log_axis",
    "panel",
    "save_png",
    "style",
    "svg",
]


@dataclass(frozen=True)
class Theme:
    """Colours as "#rrggbb": background, text, quiet text, hairlines, one per series, status colours."""

    paper: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]
    good: str
    warn: str
    bad: str


LIGHT = Theme(
    "#ffffff", "#1d2330", "#667085", "#d9dee7",
    ("#c8441b", "#2b6cb0", "#1f9e89", "#7a4fbf", "#8a6d1d", "#7b8494"),
    "#2f855a", "#b7791f", "#c53030",
)  # fmt: skip
DARK = Theme(
    "#151a23", "#e6eaf2", "#98a2b3", "#323a49",
    ("#ff8a5c", "#6cb2ff", "#4fd1b5", "#b794f6", "#e0bf5a", "#a9b1bf"),
    "#68d391", "#f6c560", "#fc8181",
)  # fmt: skip
# Placeholders: near-black colours that occur nowhere else, so that a textual replacement in the SVG is safe.
PAGE = Theme(
    "#010101", "#010102", "#010103", "#010104",
    tuple(f"#01020{i}" for i in range(6)),
    "#010105", "#010106", "#010107",
)  # fmt: skip


def _named(theme: Theme) -> dict[str, str]:
    plain = {name: getattr(theme, name) for name in ("paper", "ink", "muted", "line", "good", "warn", "bad")}
    return plain | {f"s{i}": color for i, color in enumerate(theme.series)}


def css_variables(theme: Theme) -> str:
    """The theme as CSS custom properties: `--ink: #...; --s0: #...;`."""
    return " ".join(f"--{name}: {color};" for name, color in _named(theme).items())


def style(theme: Theme) -> Any:
    """matplotlib settings: no frame, hairline grid, text kept as text in SVG."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "imstep",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": theme.ink,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }


def save_png(make: Callable[[Theme], Figure], path: Path) -> None:
    """Draw and write a PNG on a light background, 160 dots per inch."""
    with matplotlib.rc_context(style(LIGHT)):
        make(LIGHT).savefig(path, format="png", dpi=160, facecolor=LIGHT.paper, bbox_inches="tight", pad_inches=0.2)


def svg(make: Callable[[Theme], Figure], name: str, title: str) -> str:
    """Draw as an inline `<svg>` whose colours are the page's CSS variables.

    Args:
        make: draws the figure for a theme.
        name: unique on the page; prefixes the SVG's ids, which are global in HTML.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(style(PAGE) | {"svg.hashsalt": name}):
        make(PAGE).savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for key, color in _named(PAGE).items():
        text = text.replace(color, f"var(--{key})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # An image's id is a hash of its pixels, which two equal pictures share; nothing refers to it.
    text = re.sub(r'(<image [^>]*?)\s+id="[^"]*"', r"\1", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    # matplotlib measured the text with its own font; the page's is narrower, so nothing collides.
    text = text.replace("font-family: 'DejaVu Sans', sans-serif", "font-family: inherit")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', text, count=1)


def panel(draw: Callable[[Axes, Theme], None], name: str, title: str) -> str:
    """One plot as an inline `<svg>`, of a width that reads on a page's half and on a phone; see `svg`."""

    def make(theme: Theme) -> Figure:
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        draw(figure.subplots(), theme)
        return figure

    return svg(make, name, title)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_label(value: float, _position: object = None) -> str:
    """1e-3 as 10⁻³ and 2e-5 as 2·10⁻⁵ (plain Unicode: an SVG keeps it as text).

    >>> power_label(1e-3), power_label(2e-5), power_label(1.0)
    ('10⁻³', '2·10⁻⁵', '1')
    """
    if value <= 0:
        return ""
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    if int(exponent) == 0:
        return mantissa
    return power if mantissa == "1" else f"{mantissa}·{power}"


def plain_label(value: float, _position: object = None) -> str:
    """2e-3 as 0.002; powers below a thousandth and above a thousand.

    >>> plain_label(2e-3), plain_label(50.0), plain_label(1e-5)
    ('0.002', '50', '10⁻⁵')
    """
    return f"{value:g}" if 1e-3 <= value < 1e3 else power_label(value)


def log_axis(axes: Axes, which: str, *, decades: float) -> None:
    """A logarithmic axis ("x" or "y"): labels at 1, 2, 5 when it spans few decades, else at powers of ten."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    few = decades < 2.2
    steps = (1.0, 2.0, 5.0) if few else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(plain_label if few else power_label))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def linear_axis(axes: Axes, which: str, *, whole: bool = False) -> None:
    """A linear axis with about five labels."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    if whole:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
