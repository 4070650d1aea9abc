"""The site's pages before it is built: the reference is complete, lists are lists, pages are to be found."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import imstep

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"^::: (\S+)$", re.MULTILINE)
INTERNAL = {"cli", "runs"}


def documented() -> list[tuple[str, Any]]:
    """What the reference's pages name, and what that is."""
    names = [name for page in PAGES for name in NAMED.findall(page.read_text(encoding="utf-8"))]
    return [(name, written(name) if name.startswith("imstep.integrations.") else resolved(name)) for name in names]


def written(name: str) -> str:
    """The name of a class or function that is there, in a module whose import needs a package of others."""
    *module, last = name.split(".")
    source = ROOT.joinpath("src", *module).with_suffix(".py").read_text(encoding="utf-8")
    if not re.search(rf"^(?:class|def) {last}\b", source, re.MULTILINE):
        raise LookupError(name)
    return name


def resolved(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):  # a function may bear the name of its module
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise LookupError(name)


def public() -> Iterator[tuple[str, Any]]:
    """Every name of an `__all__`, of the package and of what lies directly in it."""
    inside = [m.name for m in pkgutil.iter_modules(imstep.__path__) if m.name not in INTERNAL and m.name[0] != "_"]
    for module in (imstep, *(importlib.import_module(f"imstep.{name}") for name in inside)):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not isinstance(value, ModuleType) and name != "__version__":
                yield f"{module.__name__}.{name}", value


def test_reference_has_every_public_name() -> None:
    there = [value for _, value in documented()]
    missing = [name for name, value in public() if not any(value is other for other in there)]
    assert not missing, f"Add to a page docs/reference-*.md, under the heading it belongs to, `::: NAME` for: {missing}"


def test_reference_names_nothing_twice() -> None:
    names = [name for name, _ in documented()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_items_after_a_nested_paragraph_stand_apart(page: Path) -> None:
    """Markdown takes an item that directly follows an item's second paragraph for a part of it."""
    lines = page.read_text(encoding="utf-8").splitlines()
    swallowed = [
        lines[i]
        for i in range(1, len(lines))
        if re.match(r"(\d+\.|[-*]) ", lines[i]) and lines[i - 1].startswith("    ") and nested_paragraph(lines, i - 1)
    ]
    assert not swallowed, "Put an empty line before these items."


def nested_paragraph(lines: list[str], last: int) -> bool:
    """Whether the indented lines that end at `last` follow an empty line."""
    while lines[last].startswith("    "):
        last -= 1
    return not lines[last]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_in_the_navigation(page: Path) -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(rf" {re.escape(page.name)}$", nav, re.MULTILINE), f"Add docs/{page.name} to nav in mkdocs.yml."


@pytest.fixture(scope="module")
def docstrings() -> Any:
    """The extension of the reference's collector, without the collector."""
    sys.modules.setdefault("griffe", ModuleType("griffe"))
    stub = sys.modules["griffe"]
    for name in ("Alias", "AliasResolutionError", "CyclicAliasError", "Docstring", "Extension", "Module"):
        if not hasattr(stub, name):
            setattr(stub, name, type(name, (), {}))
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "_site" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("    Example:\n        >>> 1", "    Examples:\n        >>> 1"),
        ("Source: A. Author,\n    a book.", "**Source.** A. Author,\na book."),
        ("    a, b: either,\n        or.", "    a: either,\n        or.\n    b: either,\n        or."),
        ("See :class:`Hessian` and ``x``.", "See [`Hessian`][imstep.Hessian] and `x`."),
        (":meth:`~imstep.Hessian.over`", "[`over`][imstep.Hessian.over]"),
        (":func:`torch.pow`", "`torch.pow`"),
    ],
)
def test_docstrings_are_translated(docstrings: Any, written: str, shown: str) -> None:
    assert docstrings.translated(written, {"Hessian": "imstep.Hessian", "imstep.Hessian": "imstep.Hessian"}) == shown


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_are_known(page: Path) -> None:
    """A fence that the site does not know is shown as text, with all that is in it."""
    fences = set(re.findall(r"^ *```(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    # py: Python that is shown only, since it needs packages that the tests do without.
    unknown = fences - {"py", "python", "python raises", "sh", "text", "json", "toml", "yaml"}
    assert not unknown, f"{page.name}: name the language as others do, or teach docs/_site/hooks.py these: {unknown}"
