"""The anatomy of Newton-Krylov steps: what the monitor and the inner solver did, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from imstep.runs.records import Run
from imstep.runs.theme import Theme, linear_axis, log_axis

__all__ = ["anatomy_panels", "status_color", "status_counts"]

Steps = Sequence[dict[str, Any]]

_STATUS_ORDER = (
    "converged", "best_rate", "enough", "boundary", "max_iterations",
    "disturbing_negative_curvature", "disturbing_noise", "breakdown", "non_finite",
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
        "enough": theme.series[1],
        "best_rate": theme.series[1],
        "boundary": theme.series[3],
        "max_iterations": theme.muted,
        "disturbing_negative_curvature": theme.warn,
        "disturbing_noise": theme.series[0],
        "breakdown": theme.bad,
        "non_finite": theme.bad,
    }.get(status, theme.muted)


def anatomy_panels(run: Run) -> list[tuple[str, Callable[[Axes, Theme], None]]]:
    """Step length, rho, Taylor error, products by status, damping and gradient norm over the steps."""
    steps = run.anatomy
    panels: list[tuple[str, Callable[[Axes, Theme], None]]] = [
        ("Step lengths", partial(_step_length, steps)),
        ("Actual over predicted decrease", partial(_rho, steps)),
        ("Taylor error", partial(_taylor_error, steps)),
        *([("Products", partial(_products, run))] if any(step.get("products") for step in steps) else []),
        ("Damping", partial(_line, steps, "damping", "Damping", "λ")),
        ("Gradient norm", partial(_line, steps, "gradient_norm", "Gradient norm", "‖g‖")),
    ]
    return [(title, partial(_over_steps, draw)) for title, draw in panels]


def _over_steps(draw: Callable[[Axes, Theme], None], axes: Axes, theme: Theme) -> None:
    draw(axes, theme)
    axes.set_xlabel("step")
    linear_axis(axes, "x", whole=True)


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


def _step_length(steps: Steps, axes: Axes, theme: Theme) -> None:
    x, y = _positive(steps, "step_length")
    axes.axhline(1.0, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
    axes.plot(x, y, "-", color=theme.series[0], lw=1.0, alpha=0.55)
    axes.plot(x, y, "o", ms=2.8, color=theme.series[0])
    rejected = [i + 1 for i, step in enumerate(steps) if step.get("outcome") in ("rejected", "non_finite")]
    if rejected and y:
        axes.plot(rejected, [min(y)] * len(rejected), "x", ms=5, color=theme.bad, label="refused")
        axes.legend(loc="best", fontsize=8)
    _log(axes, [*y, 1.0])
    axes.set(title="Step length (1 is the full Newton step)", ylabel="step length")


def _rho(steps: Steps, axes: Axes, theme: Theme) -> None:
    """Values outside [-0.5, 2] are drawn at the border: their size says only that the model failed."""
    x, y = _values(steps, "rho")
    axes.axhspan(0.25, 0.75, color=theme.line, alpha=0.45, lw=0)
    axes.axhline(1.0, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
    axes.plot(x, [min(max(value, -0.5), 2.0) for value in y], "o", ms=2.8, color=theme.series[1])
    axes.set_ylim(-0.6, 2.1)
    axes.set(title="ρ: actual over predicted decrease", ylabel="ρ")


def _taylor_error(steps: Steps, axes: Axes, theme: Theme) -> None:
    x, predicted = _positive(steps, "predicted_decrease")
    axes.plot(x, predicted, "-", color=theme.muted, lw=1.2, label="predicted decrease")
    x, error = _positive(steps, "taylor_error")
    axes.plot(x, error, "o", ms=2.8, color=theme.series[3], label="|Taylor error|")
    _log(axes, [*predicted, *error])
    axes.set(title="Taylor error against the predicted decrease", ylabel="change of the loss")
    if predicted or error:
        axes.legend(loc="best", fontsize=8, ncols=2)


def _products(run: Run, axes: Axes, theme: Theme) -> None:
    steps = run.anatomy
    for status, _ in status_counts(run):
        own = [(i + 1, s.get("products", 0)) for i, s in enumerate(steps) if s.get("status") == status]
        if own:
            x, y = zip(*own, strict=True)
            axes.bar(x, y, width=0.9, color=status_color(theme, status))
    axes.set(title="Products a step, by how the inner solve ended", ylabel="products")
    linear_axis(axes, "y", whole=True)


def _line(steps: Steps, key: str, title: str, unit: str, axes: Axes, theme: Theme) -> None:
    x, y = _positive(steps, key)
    axes.plot(x, y, "-", color=theme.series[2], lw=1.6)
    _log(axes, y)
    axes.set(title=title, ylabel=unit)
