"""The page of the documentation and the README's table, from the record of zoo.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.record_page import Row, table

OWN, DEFAULT, FORCED = "imstep", "double backward", "double backward, math attention"
SIDES = {
    OWN: "imstep",
    DEFAULT: "PyTorch's double backward",
    FORCED: "the same, attention forced to its mathematical formulation",
}
VERDICTS = ("right", "wrong", "refused")
PACKAGES = {"torch": "PyTorch's own modules", "torch_geometric": "PyTorch Geometric", "neuralop": "neuraloperator",
            "deepxde style": "a physics-informed network"}  # fmt: skip


def judged(record: dict[str, Any]) -> dict[str, Row]:
    """The cases that were built and have a reference."""
    built = {name: row for name, row in record["runs"].items() if "sides" in row}
    return {name: row for name, row in built.items() if all(_verdict(row, side) in VERDICTS for side in SIDES)}


def _verdict(row: Row, side: str) -> str:
    return row["sides"][side]["verdict"]


def _package(name: str) -> str:
    return name.split("/")[0]


def _counts(rows: dict[str, Row]) -> str:
    packages = list(dict.fromkeys(map(_package, rows)))
    body = []
    for package in [*packages, "all"]:
        some = [row for name, row in rows.items() if package in (_package(name), "all")]
        cells = []
        for side in SIDES:
            count = Counter(_verdict(row, side) for row in some)
            cells.append(" / ".join(str(count[verdict]) for verdict in VERDICTS))
        body.append([PACKAGES.get(package, package), str(len(some)), *cells])
    return table(["", "cases", *(f"{label}: right / wrong / refused" for label in SIDES.values())], body)


def in_brief(record: dict[str, Any]) -> str:
    """The README's table: all cases together."""
    rows = judged(record)
    body = []
    for side, label in SIDES.items():
        count = Counter(_verdict(row, side) for row in rows.values())
        body.append([label, *(str(count[verdict]) for verdict in VERDICTS)])
    wrong = _by_package([name for name, row in rows.items() if _silent(row)])
    missing = _by_package([name for name, row in rows.items() if _absent(row)])
    return "\n\n".join(
        [
            table([f"Hessian-vector products of {len(rows)} networks", *VERDICTS], body),
            f"Silently wrong by double backward and right here: {wrong}. Not there and right here, whatever attention "
            f"is used: {missing}. Case by case: [networks that others wrote](docs/zoo.md).",
        ]
    )


def _by_package(cases: list[str], most: int = 4) -> str:
    """Names of cases, a few of each package."""
    names: dict[str, list[str]] = {}
    for case in cases:
        names.setdefault(_package(case), []).append(case.split("/", 1)[1])
    rest = lambda some: f" and {len(some) - most} more" if len(some) > most else ""
    shown = {package: f"{', '.join(some[:most])}{rest(some)}" for package, some in names.items()}
    return "; ".join(text if p == "torch" else f"{PACKAGES.get(p, p)}: {text}" for p, text in shown.items())


def _silent(row: Row) -> bool:
    return _verdict(row, OWN) == "right" and _verdict(row, FORCED) == "wrong"


def _absent(row: Row) -> bool:
    return _verdict(row, OWN) == "right" and _verdict(row, FORCED) == "refused"


def page(record: dict[str, Any]) -> str:
    """Counts by package, what is not right on either side, and what was judged."""
    rows = judged(record)
    own = [[f"`{n}`", _told(r, OWN)] for n, r in rows.items() if _verdict(r, OWN) != "right"]
    wrong = [[f"`{n}`", f"{r['sides'][FORCED]['error']:.0e}"] for n, r in rows.items() if _silent(r)]
    absent = [[f"`{n}`", _told(r, FORCED)] for n, r in rows.items() if _absent(r)]
    names: dict[str, list[str]] = {}
    for name in rows:
        names.setdefault(_package(name), []).append(f"{name.split('/', 1)[1]}")
    lists = [f"- **{PACKAGES.get(package, package)}**: {', '.join(some)}" for package, some in names.items()]
    unbuilt = sum("sides" not in row for row in record["runs"].values())
    unsettled = len(record["runs"]) - unbuilt - len(rows)
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    return "\n\n".join(
        [
            _counts(rows),
            f"Packages: {versions}. {unbuilt} more model types need larger sizes, other inputs or packages than these "
            f"and were not built; {unsettled} have no reference.",
            "Not right by imstep:" if own else "All are right by imstep.",
            *([table(["case", ""], own)] if own else []),
            "Right by imstep and silently wrong by double backward, with the relative error:",
            table(["case", "error"], wrong),
            "Right by imstep, and without a second derivative in PyTorch whatever attention is used:",
            table(["case", ""], absent),
            "The cases:",
            "\n".join(lists),
        ]
    )


def _told(row: Row, side: str) -> str:
    """The verdict with its error or message, as a cell."""
    outcome = row["sides"][side]
    detail = outcome["message"] or f"{outcome['error']:.0e}"
    return f"{outcome['verdict']}: {detail}".replace("|", "/")[:200]
