"""What the pages write for tests and for GitHub, in the words of the site's Markdown."""

from __future__ import annotations

import re
from typing import Any

_LABELLED = re.compile(r"^```python (\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for each page: a program fenced as ``python raises`` gets that word as its title."""
    return _LABELLED.sub(r'```python title="\1"', markdown)
