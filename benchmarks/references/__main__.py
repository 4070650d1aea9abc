"""Methods of imstep beside the same ones in SciPy, torchzero and pytorch_optimizer, step by step.

    pip install -c constraints.txt '.[dev,peers]'
    python -m benchmarks.references           # seconds; writes docs/methods.md; fails where a method differs
    python -m benchmarks.references --table   # the page again, from the record
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib import metadata

import torch

from benchmarks.record_page import Row, load, now, path_of, show, table
from benchmarks.references.sides import CHECKS
from imstep.runs.environment import environment
from imstep.runs.files import write_json

NAME = "references"
PACKAGES = ("scipy", "torchzero", "pytorch_optimizer")


def measured() -> Row:
    """The record: each difference, and the versions of what is compared to."""
    torch.set_num_threads(1)
    versions = {name: metadata.version(name) for name in PACKAGES}
    rows = [
        {"method": c.method, "other": f"{c.package}, {c.other}", "difference": c.difference(), "bound": c.tolerance}
        for c in CHECKS
    ]
    return {"date": now(), "environment": {**environment(), **versions}, "rows": rows}


def text_of(record: Row) -> str:
    """The table."""
    body = [[f"`{row['method']}`", row["other"], f"{row['difference']:.0e}"] for row in record["rows"]]
    return table(["method", "beside", "difference"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    if not parser.parse_args().table:
        warnings.simplefilter("ignore")  # of the other packages
        write_json(path_of(NAME), measured())
    record = load(NAME)
    show(NAME, "methods", text_of(record))
    wrong = [row for row in record["rows"] if not row["difference"] <= row["bound"]]
    sys.exit(f"these differ: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
