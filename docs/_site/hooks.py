"""What the pages write for tests and for GitHub, in the words of the site."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_LABELLED = re.compile(r"^```python (\w+)$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for each page: a program fenced as ``python raises`` gets that word as its title."""
    return _LABELLED.sub(r'```python title="\1"', markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Called for each page: formulas become MathML, which browsers set without a script."""
    display = {"span": "inline", "div": "block"}
    return _FORMULA.sub(lambda found: convert(html.unescape(found[2]), display=display[found[1]]), content)
