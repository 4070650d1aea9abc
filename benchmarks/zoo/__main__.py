"""Hessian-vector products of networks that others wrote: right, wrong or refused, by imstep and by double backward.

python -m benchmarks.zoo                     # the cases that the record lacks; then the tables
python -m benchmarks.zoo --only bert nflows  # cases whose name contains a word; writes nothing
python -m benchmarks.zoo --again             # anew what imstep has not right
python -m benchmarks.zoo --table             # the tables again, from the record

Each case is a tiny, randomly initialised network, run in a process of its own for a limited time. Finished cases are
kept at once; the same command goes on after an interruption.

pip install -c constraints.txt '.[zoo]'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch

import benchmarks.zoo.shim  # noqa: F401
from benchmarks.record_page import complete, load, path_of, show
from benchmarks.zoo.judge import row
from benchmarks.zoo.problem import Problem
from benchmarks.zoo.run import isolated
from benchmarks.zoo.table import in_brief, page
from imstep.runs.files import write_atomically

NAME = "zoo"
SOURCES = ("torch_models", "packages", "transformers_models", "timm_models")
PACKAGES = (
    "transformers", "timm", "torch_geometric", "gpytorch", "torchdiffeq", "neuraloperator", "nflows", "normflows",
    "zuko",
)  # fmt: skip
LIMIT = 120.0  # seconds for a case


def cases() -> dict[str, Callable[[], Problem]]:
    """Name -> how to build it, of the packages that are installed."""
    found: dict[str, Callable[[], Problem]] = {}
    for source in SOURCES:
        found |= import_module(f"benchmarks.zoo.{source}").cases()
    return found | import_module("benchmarks.zoo.transformers_models").cases(parts=True)


def outcome(build: Callable[[], Problem]) -> dict[str, Any]:
    """The row of a case, judged in a process of its own."""
    return isolated(partial(row, build), LIMIT)


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _forget_failures() -> None:
    """Take from the record what imstep has not right, and what did not build."""
    record = load(NAME)
    right = lambda row: row.get("sides", {}).get("imstep", {}).get("verdict") == "right"
    record["runs"] = {name: row for name, row in record["runs"].items() if right(row)}
    write_atomically(path_of(NAME), f"{json.dumps(record, indent=1)}\n".encode())


def main() -> None:
    """Parse the command line, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        for name, build in cases().items():
            if any(word in name for word in options.only):
                print(name, outcome(build), flush=True)
        return
    if options.again:
        _forget_failures()
    about = {"packages": _versions(), "seconds_at_most": LIMIT}
    runs = {name: lambda build=build: outcome(build) for name, build in cases().items()}
    record = load(NAME) if options.table else complete(NAME, about, runs)
    show(NAME, "zoo", page(record))
    show(NAME, "../README", in_brief(record))


if __name__ == "__main__":
    main()
