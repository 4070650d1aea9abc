"""The frame of a report: one self-contained HTML page in the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources

from matplotlib.axes import Axes

from imstep.runs.theme import DARK, LIGHT, Theme, css_variables, panel

__all__ = ["legend", "page", "panels", "section"]

_GROUND = {"light": "#f5f6f9", "dark": "#0d1117"}


def page(title: str, kicker: str, lead: str, body: str) -> str:
    """The page as HTML text: no script, no external asset. ``body`` is HTML, the rest is plain text."""
    style = resources.files("imstep.runs").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>imstep: {escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {css_variables(LIGHT)} --ground: {_GROUND["light"]}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} --ground: {_GROUND["dark"]}; }} }}
{style}</style>
</head>
<body>
<main>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
</header>
{body}
</main>
</body>
</html>
"""


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of a page; ``content`` and ``note`` are HTML."""
    text = f'<p class="note">{note}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{text}{content}\n</section>"


def panels(draws: Sequence[tuple[str, Callable[[Axes, Theme], None]]], name: str) -> str:
    """Plots side by side where there is room, else below each other.

    Args:
        draws: what a screen reader says of each, and what draws it.
        name: unique on the page.
    """
    plots = "".join(panel(draw, f"{name}{at}", escape(title)) for at, (title, draw) in enumerate(draws))
    return f'<div class="panels">{plots}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Labels with the colours, as CSS, of their lines."""
    items = "".join(
        f'<li><span class="dot" style="background: {color}"></span>{escape(label)}</li>' for label, color in entries
    )
    return f'<ul class="chips">{items}</ul>'
