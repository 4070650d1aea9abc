"""docs/limits.md: each program that is refused raises what the page quotes, and each way out runs."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "limits.md"
_REFUSED = re.compile(r"^```python raises\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUNS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"^> (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Limit:
    """A section of the page."""

    title: str
    refused: str
    message: str
    way_out: str


def limits() -> tuple[str, list[Limit]]:
    """What all programs begin with, and the sections."""
    beginning, *sections = PAGE.read_text(encoding="utf-8").split("\n### ")
    found = []
    for text in sections:
        (refused,), (way_out,) = _REFUSED.findall(text), _RUNS.findall(text)
        found.append(Limit(text.splitlines()[0], refused, " ".join(_QUOTED.findall(text)), way_out))
    return _RUNS.findall(beginning)[0], found


BEGINNING, LIMITS = limits()


def run(source: str) -> None:
    """Execute a program of the page, with what all begin with."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(BEGINNING + source, str(PAGE), "exec", dont_inherit=True), namespace)


def raised(source: str) -> str:
    """Type and message of the error, on one line, without the line of code that it names."""
    with pytest.raises(Exception) as caught:
        run(source)
    message = re.sub(r" \(called from [^)]*\)", "", f"{caught.type.__name__}: {caught.value}")
    return " ".join(message.split())


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.title)
def test_refused_as_the_page_says(limit: Limit) -> None:
    assert raised(limit.refused) == limit.message


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.title)
def test_way_out(limit: Limit) -> None:
    run(limit.way_out)
