"""Runs every program of examples/ and writes the gallery: what it says of itself, its picture, what it printed.

python docs/_site/gallery.py             # all
python docs/_site/gallery.py regression  # one; the others stay as they are on the page

A program has a docstring and a `main`. If it also has `draw(figure, result)`, with what `main` returned, the page shows
the picture.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import torch
from style import save

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gallery.md"

HEAD = """# Gallery

With these programs you can begin your own: each is short, complete, and runs as it is. Below each stands what it
printed when this page was made. They are in the folder `examples/`.
"""


def section(path: Path) -> str:
    """The part of the page that shows one program."""
    printed = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(path))
        result = names["main"]()
    paragraphs = (names["__doc__"] or path.stem).strip().replace("``", "`").split("\n\n")
    about = "\n\n".join(text for text in paragraphs if not text.startswith("    "))
    picture = ""
    if "draw" in names:
        save(f"example-{path.stem}", lambda figure: names["draw"](figure, result))
        picture = f"![What {path.stem}.py draws](images/example-{path.stem}.svg)\n\n"
    output = f'<div class="output" markdown>\n\n```text\n{printed.getvalue().rstrip()}\n```\n\n</div>\n'
    code = f'??? example "examples/{path.name}"\n\n    ```python\n    --8<-- "examples/{path.name}"\n    ```\n\n'
    return f"## {path.stem}\n\n{about}\n\n{picture}{code}{output}"


def main() -> None:
    torch.set_num_threads(1)
    old = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE.read_text() if PAGE.exists() else "", re.M | re.S))
    sections = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        kept = old.get(path.stem) if sys.argv[1:] and path.stem not in sys.argv[1:] else None
        sections.append(section(path) if kept is None else f"## {path.stem}\n{kept}".rstrip() + "\n")
    PAGE.write_text("\n".join([HEAD, *sections]))


if __name__ == "__main__":
    main()
