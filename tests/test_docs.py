"""README and documentation: every Python block runs, every relative link leads somewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("documentation", Path(__file__).with_name("documentation.py"))
assert _spec is not None
assert _spec.loader is not None
documentation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(documentation)

PAGES = documentation.PAGES
NAMES = [str(page.relative_to(documentation.ROOT)) for page in PAGES]


# Each program of limits.md begins anew: see test_limits.py.
PROGRAMS = [page for page in PAGES if documentation.blocks(page) and page.name != "limits.md"]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    try:
        documentation.run(page)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    assert documentation.broken_links(page) == []


def test_a_block_that_fails_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        documentation.run(page)
    assert caught.traceback[-1].lineno + 1 == 5


def test_readme_names_both_commands() -> None:
    text = (documentation.ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
