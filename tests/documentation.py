"""The Python blocks of a Markdown page, run in order as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)|<img[^>]+src=\"([^\"]+)\"")


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first statement, source) of each block fenced as ``python``."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in _BLOCK.finditer(text)]


def run(page: Path) -> dict[str, Any]:
    """Execute the page's blocks in one namespace, and return it; a traceback shows the page's own line numbers."""
    namespace: dict[str, Any] = {"__name__": "__main__"}  # dataclasses look their module up
    for line, source in blocks(page):
        exec(compile("\n" * (line - 1) + source, str(page), "exec", dont_inherit=True), namespace)
    return namespace


def broken_links(page: Path) -> list[str]:
    """Relative targets of links and pictures that are not there; code is not looked at."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [first or second for first, second in _LINK.findall(prose)]
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    return [t for t in local if not (page.parent / t).exists()]
