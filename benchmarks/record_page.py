"""Records and tables of benchmarks: runs are saved one by one, tables stand on pages of docs between marks."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from imstep.runs.environment import environment
from imstep.runs.files import write_atomically

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
Row = dict[str, Any]


def path_of(name: str) -> Path:
    """Where the record of a question lies: beside its program."""
    return HERE / name.replace("-", "_") / "record.json"


def complete(name: str, about: Mapping[str, Any], runs: Mapping[str, Callable[[], Row]]) -> dict[str, Any]:
    """The record of a question with the runs that it lacks made, each saved at once; runs no longer asked for go.

    Numbers that are not finite are kept as text, which JSON has, and `float` reads back.
    """
    path = path_of(name)
    made: dict[str, Row] = load(name)["runs"] if path.exists() else {}
    for key, run in runs.items():
        if key not in made:
            made[key] = {k: writable(v) for k, v in run().items()}
            ordered = {key: made[key] for key in runs if key in made}
            record = {"date": now(), "environment": environment(), **about, "runs": ordered}
            write_atomically(path, f"{json.dumps(record, indent=1)}\n".encode())
            print(key, *(f"{k} {v}" for k, v in made[key].items()), flush=True)
    return load(name)


def now() -> str:
    """The date of a record."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def writable(value: Any) -> Any:
    """A number of a row as JSON has it; text where it is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(name: str) -> dict[str, Any]:
    """What `complete` wrote."""
    return json.loads(path_of(name).read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(name: str, page: str, text: str) -> None:
    """Put the text between the marks NAME:begin and NAME:end of docs/PAGE.md, with what it was measured on."""
    record = load(name)
    versions = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    put(name, DOCS / f"{page}.md", f"{text}\n\nMeasured {record['date']}; {versions}.")


def put(name: str, path: Path, text: str) -> None:
    """Put the text between the marks NAME:begin and NAME:end of a page."""
    block, old = f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->", path.read_text(encoding="utf-8")
    marked = re.compile(rf"<!-- {name}:begin -->.*<!-- {name}:end -->", re.DOTALL)
    if not marked.search(old):
        raise ValueError(f"{path} has no marks <!-- {name}:begin --> and <!-- {name}:end -->. Add them.")
    path.write_text(marked.sub(lambda _: block, old), encoding="utf-8")


def command(
    description: str | None,
    name: str,
    page: str,
    text_of: Callable[[dict[str, Any]], str],
    runs: Callable[[], Mapping[str, Callable[[], Row]]],
) -> None:
    """The command line of a question: make what the record lacks, on one thread, and write the page; or the page only.

    Args:
        description: of the program.
        name, page: see `show`.
        text_of: the record in Markdown.
        runs: all runs, by name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    show(name, page, text_of(load(name) if arguments.table else complete(name, {}, runs())))
