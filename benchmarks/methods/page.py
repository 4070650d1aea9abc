"""The record as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.methods.problems import SUBJECTS
from benchmarks.record_page import Row, table

LEADING = 0.2
"""The share of methods that lead on a problem."""


def text_of(record: Mapping[str, Any]) -> str:
    """What each method reaches, by cost and by time, and on which problems it is among the best fifth."""
    rows = list(record["runs"].values())
    return "\n\n".join(
        [
            "Lowest training loss within the same number of gradient-equivalents, by the best of three settings; the "
            f"best {LEADING:.0%} of each column in bold, — where a method refuses or one step costs more, and a star "
            "where it took too long to spend them:",
            _losses(rows, "loss"),
            "Within the same number of seconds:",
            _losses(rows, "loss_in_time"),
            "What each setting was, and where a method leads:",
            _gist(rows),
        ]
    )


def _best(rows: list[Row], key: str) -> dict[tuple[str, str], tuple[float, str]]:
    """(method, problem) -> the lowest loss with its setting."""
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        where = row["method"], row["problem"]
        loss = _number(row.get(key))
        if where not in found or loss < found[where][0]:
            found[where] = loss, row["setting"]
    return found


def _losses(rows: list[Row], key: str) -> str:
    best, problems = _best(rows, key), _problems(rows)
    short = {(r["method"], r["problem"]) for r in rows if r.get("end") == "seconds"}
    leaders = {problem: _leaders(best, problem) for problem in problems}
    ranks = {problem: _ranks(best, problem) for problem in problems}

    def cell(method: str, problem: str) -> str:
        loss = best[method, problem][0]
        shown = f"{loss:.1e}" if math.isfinite(loss) else "—"
        shown += "\\*" if key == "loss" and (method, problem) in short else ""
        return f"**{shown}**" if method in leaders[problem] else shown

    order = {m: statistics.fmean(ranks[p][m] for p in problems) for m in _methods(rows)}
    body = [
        [f"`{m}`", *(cell(m, p) for p in problems), f"{order[m]:.0f}"] for m in sorted(order, key=order.__getitem__)
    ]
    return table(["method", *problems, "mean rank"], body)


def _gist(rows: list[Row]) -> str:
    best, problems = _best(rows, "loss"), _problems(rows)
    in_time = _best(rows, "loss_in_time")
    body = []
    for method in _methods(rows):
        settings = ", ".join(best[method, p][1] if math.isfinite(best[method, p][0]) else "—" for p in problems)
        leads = [", ".join(p for p in problems if method in _leaders(b, p)) or "—" for b in (best, in_time)]
        body.append([f"`{method}`", settings, *leads])
    return table(["method", f"best setting ({', '.join(problems)})", "leads by cost", "leads by time"], body)


def _leaders(best: Mapping[tuple[str, str], tuple[float, str]], problem: str) -> set[str]:
    ranks = {m: r for m, r in _ranks(best, problem).items() if math.isfinite(best[m, problem][0])}
    return {method for method, rank in ranks.items() if rank <= max(1, LEADING * len(ranks))}


def _ranks(best: Mapping[tuple[str, str], tuple[float, str]], problem: str) -> dict[str, int]:
    """1 for the lowest; equal losses share a rank, and what did not run is last."""
    losses = {method: loss for (method, at), (loss, _) in best.items() if at == problem}
    return {method: 1 + sum(other < loss for other in losses.values()) for method, loss in losses.items()}


def _number(value: Any) -> float:
    """A loss; infinity where there is none, and rounding below 1e-15 is as good as zero."""
    loss = math.inf if value is None else float(value)
    return max(loss, 1e-15) if loss == loss else math.inf


def _problems(rows: list[Row]) -> list[str]:
    present = {row["problem"] for row in rows}
    return [s.name for s in SUBJECTS if s.name in present]


def _methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))
