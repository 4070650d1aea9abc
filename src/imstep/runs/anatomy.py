"""The anatomy of Newton-Krylov steps: what the monitor and the inner solver did, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imstep.runs.records import Run
from imstep.runs.theme import Theme, linear_axis, log_axis

__all__ = ["anatomy_figure", "status_color", "status_counts"]

Steps = Sequence[dict[str, Any]]

_STATUS_ORDER = (
    "converged", "best_rate", "stalled", "boundary", "max_iterations",
    "disturbing_negative_curvature", "disturbing_noise", "non_finite",
)  # fmt: skip


def status_counts(run: Run) -> list[tuple[str, int]]:
    """How the inner solves ended, in a fixed order, unknown names last."""
    counts = Counter(run.statuses)
    known = [(name, counts.pop(name)) for name in _STATUS_ORDER if name in counts]
    return known + sorted(counts.items())


def status_color(theme: Theme, status: str) -> str:
    """Calm colours for a solve that ended by a rule, warm ones for a disturbing direction."""
    return {
        "converged": theme.good,
        "stalled": theme.series[1],
        "best_rate": theme.series[1],
        "boundary": theme.series[3],
        "max_iterations": theme.muted,
        "disturbing_negative_curvature": theme.warn,
        "disturbing_noise": theme.series[0],
        "non_finite": theme.bad,
    }.get(status, theme.muted)


def anatomy_figure(run: Run, theme: Theme) -> Figure:
    """Step length, rho, Taylor error, products by status, damping and gradient norm over the steps."""
    figure = Figure(figsize=(10.4, 7.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.11, w_pad=0.09)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(3, 2, sharex=True)
    steps = run.anatomy
    _step_length(axes[0, 0], steps, theme)
    _rho(axes[0, 1], steps, theme)
    _taylor_error(axes[1, 0], steps, theme)
    _products(axes[1, 1], steps, run, theme)
    _line(axes[2, 0], steps, "damping", "Damping", theme)
    _line(axes[2, 1], steps, "gradient_norm", "Gradient norm", theme)
    for below in axes[2]:
        below.set_xlabel("step")
        linear_axis(below, "x", whole=True)
    return figure


def _values(steps: Steps, key: str) -> tuple[list[int], list[float]]:
    """(step, value) where the value is a finite number."""
    pairs = [
        (index + 1, float(step[key]))
        for index, step in enumerate(steps)
        if isinstance(step.get(key), int | float) and math.isfinite(step[key])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _positive(steps: Steps, key: str) -> tuple[list[int], list[float]]:
    x, y = _values(steps, key)
    pairs = [(a, abs(b)) for a, b in zip(x, y, strict=True) if b]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _log(axes: Axes, values: Sequence[float]) -> None:
    if values:
        log_axis(axes, "y", decades=max(1.0, math.log10(max(values) / min(values))))


def _step_length(axes: Axes, steps: Steps, theme: Theme) -> None:
    x, y = _positive(steps, "step_length")
    axes.axhline(1.0, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
    axes.plot(x, y, "-", color=theme.series[0], lw=1.0, alpha=0.55)
    axes.plot(x, y, "o", ms=2.8, color=theme.series[0])
    rejected = [i + 1 for i, step in enumerate(steps) if step.get("outcome") in ("rejected", "non_finite")]
    if rejected and y:
        axes.plot(rejected, [min(y)] * len(rejected), "x", ms=5, color=theme.bad, label="refused")
        axes.legend(loc="best", fontsize=8)
    _log(axes, [*y, 1.0])
    axes.set_title("Step length (1 is the full Newton step)")


def _rho(axes: Axes, steps: Steps, theme: Theme) -> None:
    """Values outside [-0.5, 2] are drawn at the border: their size says only that the model failed."""
    x, y = _values(steps, "rho")
    axes.axhspan(0.25, 0.75, color=theme.line, alpha=0.45, lw=0)
    axes.axhline(1.0, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
    axes.plot(x, [min(max(value, -0.5), 2.0) for value in y], "o", ms=2.8, color=theme.series[1])
    axes.set_ylim(-0.6, 2.1)
    axes.set_title("rho: actual over predicted decrease")


def _taylor_error(axes: Axes, steps: Steps, theme: Theme) -> None:
    x, predicted = _positive(steps, "predicted_decrease")
    axes.plot(x, predicted, "-", color=theme.muted, lw=1.2, label="predicted decrease")
    x, error = _positive(steps, "taylor_error")
    axes.plot(x, error, "o", ms=2.8, color=theme.series[3], label="|Taylor error|")
    _log(axes, [*predicted, *error])
    axes.set_title("Taylor error against the predicted decrease")
    if predicted or error:
        axes.legend(loc="best", fontsize=8, ncols=2)


def _products(axes: Axes, steps: Steps, run: Run, theme: Theme) -> None:
    for status, _ in status_counts(run):
        own = [(i + 1, s.get("products", 0)) for i, s in enumerate(steps) if s.get("status") == status]
        if own:
            x, y = zip(*own, strict=True)
            axes.bar(x, y, width=0.9, color=status_color(theme, status))
    axes.set_title("Products a step, coloured by how the inner solve ended")


def _line(axes: Axes, steps: Steps, key: str, title: str, theme: Theme) -> None:
    x, y = _positive(steps, key)
    axes.plot(x, y, "-", color=theme.series[2], lw=1.6)
    _log(axes, y)
    axes.set_title(title)
