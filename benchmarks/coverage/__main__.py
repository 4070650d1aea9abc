"""Walk PyTorch's operator and module databases and record what the complex step differentiates.

python -m benchmarks.coverage                  # all entries, six samples each; writes record.json
python -m benchmarks.coverage --only linalg    # entries whose name contains a word; writes nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.directional_walk import judge_directional
from benchmarks.coverage.module_walk import EXPLAINED, judge_module, modules
from benchmarks.coverage.operator_walk import Entry, Judgement, judge, yardstick

HERE = Path(__file__).resolve().parent
RECORD = HERE / "record.json"
TABLE = HERE.parents[1] / "docs" / "coverage.md"


Verdicts = tuple[Entry, Entry]  # on Hessian products, on directional derivatives


def walk(names: list[str], samples: int, h: float | None, jobs: int) -> list[Verdicts]:
    """Judge the named entries on ``jobs`` processes, reporting failures as they come."""
    verdicts = []
    with ProcessPoolExecutor(jobs, initializer=_prepare) as pool:
        for both in pool.map(_one, names, [samples] * len(names), [h] * len(names)):
            verdicts.append(both)
            for what, entry in zip(("product", "directional derivative"), both, strict=True):
                if not entry.passed:
                    print(f"{entry.name}, {what}: {_outcome(entry)}", flush=True)
    return verdicts


def _prepare() -> None:
    torch.set_num_threads(1)
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # blocks of directions on rare operators are slow


def _one(name: str, samples: int, h: float | None) -> Verdicts:
    if name.startswith("nn."):
        return judge_module(next(info for info in modules() if info.name == name))
    entry = next(op for op in yardstick() if op.formatted_name == name)
    return judge(entry, samples, h), judge_directional(entry, samples)


def _outcome(entry: Entry) -> str:
    if not entry.samples:
        return "no usable sample"
    return f"{entry.worst.judgement.value}: {entry.worst.message}".replace("|", "/")


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


def table(operators: list[Verdicts], of_modules: list[Verdicts]) -> str:
    """The page of the documentation."""
    products, slopes = (summary([both[i] for both in operators]) for i in (0, 1))
    by_module, slopes_by_module = (summary([both[i] for both in of_modules]) for i in (0, 1))
    lines = [
        "# Operator coverage",
        "",
        "With this page you can look up whether PyTorch's operators can be differentiated here, and which cannot.",
        "",
        f"PyTorch {torch.__version__} on the CPU in float64. Written by `benchmarks/coverage`.",
        "",
        "| database | entries | Hessian product | directional derivative |",
        "|---|---|---|---|",
        f"| operators (`op_db`) that support autograd | {products['entries']} | **{products['passed']}** | "
        f"**{slopes['passed']}** |",
        f"| modules (`module_db`), train and eval mode | {by_module['entries']} | **{by_module['passed']}** | "
        f"**{slopes_by_module['passed']}** |",
        "",
        "A Hessian product is compared with double backward, a directional derivative with reverse mode; each with "
        "central differences where PyTorch has no such derivative or one that disagrees: on "
        f"{products['passed_by_differences']} operators for products, {slopes['passed_by_differences']} for "
        "directional derivatives.",
        "",
        "Not passed:",
        "",
        "| | Hessian product | directional derivative |",
        "|---|---|---|",
    ]
    for both in (*operators, *of_modules):
        if not all(e.passed for e in both):
            cells = ["passed" if e.passed else EXPLAINED.get(e.name) or _outcome(e) for e in both]
            lines.append(f"| `{both[0].name}` | {cells[0]} | {cells[1]} |")
    lines += _by_differences("double backward", [both[0] for both in (*operators, *of_modules)])
    lines += _by_differences("reverse mode", [both[1] for both in (*operators, *of_modules)])
    return "\n".join(lines) + "\n"


def _by_differences(reference: str, entries: list[Entry]) -> list[str]:
    lines = ["", f"Judged by differences, {reference} being absent or off:", "", f"| | {reference} |", "|---|---|"]
    for e in entries:
        reason = next((s.message for s in e.samples if s.judgement is Judgement.DIFFERENCES), None)
        if e.passed and reason:
            lines.append(f"| `{e.name}` | {reason.replace('|', '/')} |")
    return lines


def record(operators: list[Verdicts], of_modules: list[Verdicts], samples: int) -> dict[str, Any]:
    """The JSON record."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    listed = lambda verdicts: [{**e.to_dict(), "directional": d.to_dict()} for e, d in verdicts]
    return {
        "date": datetime.date.today().isoformat(),
        **machine,
        **summary([e for e, _ in operators]),
        "directional": summary([d for _, d in operators]),
        "modules": summary([e for e, _ in of_modules]),
        "modules_directional": summary([d for _, d in of_modules]),
        "samples": samples,
        "operators": listed(operators),
        "module_entries": listed(of_modules),
    }


def _lines(content: dict[str, Any]) -> str:
    """JSON with one line for each entry of a list."""
    line = lambda v: "[\n" + ",\n".join(map(json.dumps, v)) + "\n]" if isinstance(v, list) else json.dumps(v)
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {line(v)}" for k, v in content.items()) + "\n}\n"


def main() -> None:
    """Parse the command line, walk, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--h", type=float, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    start = time.perf_counter()
    chosen = lambda names: [n for n in names if not arguments.only or any(word in n for word in arguments.only)]
    sides = []
    for names in ([op.formatted_name for op in yardstick()], [info.name for info in modules()]):
        verdicts = walk(chosen(names), arguments.samples, arguments.h, arguments.jobs)
        for what, side in zip(("products", "directional derivatives"), zip(*verdicts, strict=True), strict=False):
            print(what, summary(list(side)))
        sides.append(verdicts)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.only or arguments.h is not None:
        return
    RECORD.write_text(_lines(record(*sides, arguments.samples)))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(*sides))


if __name__ == "__main__":
    main()
