"""Walk PyTorch's operator database and record which operators the complex step differentiates.

python benchmarks/coverage.py                  # all entries, six samples each; writes records/coverage.json
python benchmarks/coverage.py --only linalg    # entries whose name contains a word; writes nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from operator_walk import Entry, Judgement, judge, yardstick

HERE = Path(__file__).resolve().parent
RECORD = HERE / "records" / "coverage.json"
TABLE = HERE.parent / "docs" / "coverage.md"


def walk(names: list[str], samples: int, h: float | None, jobs: int) -> list[Entry]:
    """Judge the named entries on ``jobs`` processes, reporting failures as they come."""
    entries = []
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for entry in pool.map(_one, names, [samples] * len(names), [h] * len(names)):
            entries.append(entry)
            if not entry.passed:
                s = entry.worst if entry.samples else None
                print(f"{entry.name}: {s.judgement.value if s else 'no sample'} {s.message if s else ''}", flush=True)
    return entries


def _one(name: str, samples: int, h: float | None) -> Entry:
    entry = next(op for op in yardstick() if op.formatted_name == name)
    return judge(entry, samples, h)


def summary(entries: list[Entry]) -> dict[str, int]:
    """The counts of the record."""
    usable = [e for e in entries if e.usable]
    by_differences = [e for e in usable if e.passed and any(s.judgement is Judgement.DIFFERENCES for s in e.samples)]
    return {
        "entries": len(entries),
        "usable": len(usable),
        "passed": sum(e.passed for e in usable),
        "passed_by_differences": len(by_differences),
    }


def table(entries: list[Entry], counts: dict[str, int]) -> str:
    """The page of the documentation."""
    lines = [
        "# Operator coverage",
        "",
        f"PyTorch {torch.__version__}: {counts['entries']} entries of its operator database support autograd "
        "in float64, "
        f"{counts['usable']} of them have a sample that PyTorch can differentiate once; "
        f"the complex-step Hessian product is right on **{counts['passed']}**. "
        f"{counts['passed_by_differences']} of these include a sample on which PyTorch's double backward fails or is "
        "wrong, "
        "judged by central differences of the gradient. Written by `benchmarks/coverage.py`.",
        "",
        "| operator | what happened |",
        "|---|---|",
    ]
    for e in entries:
        if not e.passed:
            what = f"{e.worst.judgement.value}: {e.worst.message}" if e.samples else "no usable sample"
            lines.append(f"| `{e.name}` | {what.replace('|', '/')} |")
    lines += ["", "Judged by differences:", "", "| operator | double backward |", "|---|---|"]
    for e in entries:
        reason = next((s.message for s in e.samples if s.judgement is Judgement.DIFFERENCES), None)
        if e.passed and reason:
            lines.append(f"| `{e.name}` | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, walk, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--h", type=float, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names = [op.formatted_name for op in yardstick()]
    if arguments.only:
        names = [n for n in names if any(word in n for word in arguments.only)]
    entries = walk(names, arguments.samples, arguments.h, arguments.jobs)
    counts = summary(entries)
    print(counts, f"{sum(e.seconds for e in entries):.0f} s of work")
    if arguments.only or arguments.h is not None:
        return
    RECORD.parent.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    date = datetime.date.today().isoformat()
    record = {
        "date": date,
        **machine,
        **counts,
        "samples": arguments.samples,
        "operators": [e.to_dict() for e in entries],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(entries, counts))


if __name__ == "__main__":
    main()
