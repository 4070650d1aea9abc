"""The record in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.products.sides import GRADIENT
from benchmarks.record_page import Row, table

TOLERANCES = {
    "differences": 1e-5,
    "finite arithmetic": 1e-10,
    "block": 1e-10,
    "asymmetry": 1e-10,
    "CPU": 1e-8,
    "captured": 1e-10,
    "after a refusal": 1e-10,
    "PyTorch's gradient": 1e-10,
    "double backward": 1e-8,
    "parameters": 1e-6,
}
"""Of errors in float64. PyTorch's own double backward is wrong for some networks: `differences` judge. Where its
gradient differs between devices, so may all the rest."""


def text_of(record: Mapping[str, Any]) -> str:
    """All sections."""
    parts = []
    for name, section in record["sections"].items():
        head = f"### {_TITLES[name]}\n\nThis part {section['ended']} after {section['seconds']:.0f} of its "
        parts.append(f"{head}{section['limit']:.0f} seconds.\n\n{_TABLES[name](section['rows'])}")
    return "\n\n".join(parts)


def _number(value: Any, digits: str = ".3g") -> str:
    return format(float(value), digits) if isinstance(value, (int, float)) else str(value)


def _checks(rows: list[Row]) -> str:
    """How many agree; those that do not, one by one."""
    off = [row for row in rows if "failure" in row or any(_off(row, key) for key in TOLERANCES)]
    lines = [f"{len(rows) - len(off)} of {len(rows)} checks agree to {', '.join(map(_tolerance, TOLERANCES))}."]
    if off:
        cells = [
            [row["name"], row.get("failure") or ", ".join(f"{k} {_number(row[k])}" for k in TOLERANCES if _off(row, k))]
            for row in off
        ]
        lines += ["", table(["off", "how"], cells)]
    return "\n".join(lines)


def _off(row: Row, key: str) -> bool:
    value = row.get(key, 0.0)
    return isinstance(value, (int, float)) and not float(value) <= TOLERANCES[key]


def _tolerance(key: str) -> str:
    return f"{TOLERANCES[key]:.0e} ({key})"


def _costs(rows: list[Row]) -> str:
    """Time of a product, its memory and its error, side by side."""
    measured = [key for row in rows for key in row if key.endswith((", ms", ", failure"))]
    sides = list(dict.fromkeys(key.rpartition(", ")[0] for key in measured))
    cells = []
    for side in sides:
        line = [side]
        for row in rows:
            if f"{side}, ms" not in row:
                line.append(str(row.get("failure") or row.get(f"{side}, failure", "")))
                continue
            of = lambda key, side=side, row=row: float(row[f"{side}, {key}"])
            times = of("ms") / float(row[f"{GRADIENT.name}, ms"])
            error = f", {of('error'):.0e}" if f"{side}, error" in row else ""
            line.append(f"{of('ms'):.3g} ms, {times:.2f} gradients, {of('MiB'):.3g} MiB{error}")
        cells.append(line)
    return table(["side", *(row["name"] for row in rows)], cells)


def _trained(rows: list[Row]) -> str:
    keys = ("steps", "seconds", "ms a step", "error at the start", "error", "loss", "failure")
    keys = tuple(key for key in keys if any(key in row for row in rows))
    cells = [[row["name"], *(_number(row.get(key, "")) for key in keys)] for row in rows]
    lines = [table(["run", *keys], cells), "", "Errors on the way:", ""]
    return "\n".join(lines + [f"- {row['name']}: {'; '.join(row['course'])}." for row in rows if "course" in row])


def _stream(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        facts = {key: value for key, value in row.items() if key != "name" and not isinstance(value, list)}
        lines.append(f"**{row['name']}**: {'; '.join(f'{key} {_number(value)}' for key, value in facts.items())}.")
        lines += [f"- {key}: {'; '.join(value)}" for key, value in row.items() if isinstance(value, list)]
        lines.append("")
    return "\n".join(lines).rstrip()


_TITLES = {
    "checks": "Products and steps in float64",
    "costs": "What a product costs in float32",
    "physics": "Physics-informed networks by LeastSquares",
    "autoencoder": "A deep autoencoder, equal time for each",
    "stream": "Where a step waits",
}
_TABLES = {
    "checks": _checks, "costs": _costs, "physics": _trained, "autoencoder": _trained, "stream": _stream,
}  # fmt: skip
