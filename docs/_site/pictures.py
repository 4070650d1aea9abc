"""Draws the pictures of the explanations: each shows the idea that the page's formula then says.

python docs/_site/pictures.py             # all, into docs/images
python docs/_site/pictures.py termination # one
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from style import BLUE, BROWN, GREEN, INK, LINE, MUTED, RED, VIOLET, bare, save

import imstep

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def complex_step(figure: Figure) -> None:
    """A chord and the tangent; the errors of both formulas over h."""
    f = lambda z: np.exp(z) / np.sqrt(np.sin(z) ** 3 + np.cos(z) ** 3)
    at, exact = 1.5, 4.0534278938986207
    left, right = figure.subplots(1, 2)
    x, far = np.linspace(0.9, 2.0, 200), 0.4
    left.plot(x, f(x), color=INK)
    left.plot(x, f(at) + exact * (x - at), color=RED, linewidth=1.3, label="tangent")
    slope = (f(at + far) - f(at)) / far
    left.plot(x, f(at) + slope * (x - at), color=BLUE, linewidth=1.3, linestyle="--", label="chord")
    left.plot([at, at + far], [f(at), f(at + far)], "o", color=BLUE)
    left.set(title="A chord is not the tangent", xlabel="x", ylabel="f", ylim=(1.5, 8))
    left.legend(loc="upper left")
    steps = 10.0 ** np.arange(-1, -20.25, -0.25)
    floor = 1e-17
    real = [max(abs((f(at + h) - f(at)) / h - exact) / exact, floor) for h in steps]
    imaginary = [max(abs(float(imstep.derivative(f, at, h=float(h))) - exact) / exact, floor) for h in steps]
    right.loglog(steps, real, color=BLUE, linestyle="--", label="difference")
    right.loglog(steps, imaginary, color=RED, label="complex step")
    right.invert_xaxis()
    right.set(title="Relative error of the slope", xlabel="h", ylim=(1e-18, 10))
    right.legend(loc="center right", bbox_to_anchor=(1.0, 0.45))


def _path_of_cg(matrix: np.ndarray, rhs: np.ndarray) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Iterates of conjugate gradients, and the direction that disturbs."""
    points, x, r = [np.zeros(2)], np.zeros(2), rhs
    p = r
    for _ in range(2):
        curvature = p @ matrix @ p
        if curvature <= 0:
            return points, p
        step = r @ r / curvature
        x, new = x + step * p, r - step * matrix @ p
        points.append(x)
        p, r = new + (new @ new) / (r @ r) * p, new
    return points, None


def termination(figure: Figure) -> None:
    """Conjugate gradients on a bowl and on a saddle."""
    rhs = np.array([2.0, -1.0])
    for axes, matrix, title in zip(
        figure.subplots(1, 2),
        (np.array([[2.0, 0.6], [0.6, 0.7]]), np.array([[2.0, 0.2], [0.2, -0.6]])),
        ("A bowl", "A saddle"),
        strict=True,
    ):
        x, y = np.meshgrid(np.linspace(-1.0, 3.5, 160), np.linspace(-3.4, 1.0, 160))
        at = np.stack([x, y], axis=-1)
        values = ((at @ matrix) * at).sum(-1) / 2 - at @ rhs
        axes.contour(x, y, values, levels=18, cmap="Greys_r", linewidths=0.8)
        points, disturbing = _path_of_cg(matrix, rhs)
        way = np.array(points)
        axes.plot(way[:, 0], way[:, 1], "o-", color=BLUE, label="conjugate gradients")
        if disturbing is not None:
            ahead = points[-1] + 1.5 * disturbing / np.linalg.norm(disturbing)
            axes.annotate("", ahead, points[-1], arrowprops={"arrowstyle": "->", "color": RED, "linewidth": 1.8})
            axes.text(ahead[0] + 0.12, ahead[1] + 0.3, "pᵀA p < 0", color=RED)
        axes.set(title=title, aspect="equal", xlim=(-1.0, 3.5), ylim=(-3.4, 1.0))
        bare(axes)
        axes.text(-0.1, 0.15, "start", ha="right", color=BLUE)


def best_rate(figure: Figure) -> None:
    """What products earn, and the line from the origin."""
    axes = figure.subplots()
    fixed, each = 3.0, 4 / 3
    products = np.arange(0, 26)
    decrease = 1 - np.exp(-products / 6.0)
    cost = fixed + each * products
    best = int(np.argmax(decrease / cost))
    axes.plot(cost, decrease, "o-", color=BLUE, markersize=3.5, label="q, decrease promised after j products")
    end = 22.0
    axes.plot([0, end], [0, decrease[best] / cost[best] * end], color=RED, label="best rate: the steepest line")
    axes.plot([cost[best]], [decrease[best]], "o", color=RED, markersize=8)
    axes.annotate("stop here", (cost[best], decrease[best]), (cost[best] + 2.5, decrease[best] - 0.22), color=RED,
                  arrowprops={"arrowstyle": "-", "color": RED})  # fmt: skip
    axes.axvspan(0, fixed, color=LINE, alpha=0.6, linewidth=0)
    axes.text(fixed / 2, 0.92, "c₀", ha="center", color=MUTED)
    axes.set(xlabel="cost of the step, in gradients", ylabel="decrease", xlim=(0, 36), ylim=(0, 1.12))
    axes.legend(loc="lower right")


def taylor_monitor(figure: Figure) -> None:
    """A loss along d, its parabola, and the gap between them."""
    left, right = figure.subplots(1, 2)
    t = np.linspace(0, 1.5, 200)
    slope, curvature, third = -2.0, 2.0, 1.6
    model = 2 + slope * t + curvature * t**2 / 2
    error = third * t**3 / 2
    loss, decrease = model + error, 2 - model
    left.plot(t, loss, color=INK, label="loss f(w + td)")
    left.plot(t, model, color=BLUE, linestyle="--", label="parabola m(t)")
    left.fill_between(t, model, loss, color=RED, alpha=0.15, linewidth=0, label="error E(t)")
    allowed = error <= decrease / 4
    t_max = t[np.nonzero(allowed)[0].max()]
    at = np.interp(t_max, t, loss)
    left.plot([t_max], [at], "o", color=RED)
    left.axvline(t_max, color=RED, linewidth=1, linestyle=":")
    left.set(title="The parabola is right nearby", xlabel="t", ylim=(0.8, 3.4))
    left.legend(loc="upper left")
    right.plot(t, error, color=RED, label="error")
    right.plot(t, decrease / 4, color=BLUE, linestyle="--", label="¼ of the promised decrease")
    right.axvline(t_max, color=RED, linewidth=1, linestyle=":")
    right.text(t_max + 0.03, 0.03, "longest trusted step", color=RED)
    right.set(title="The error grows like t³", xlabel="t", xlim=(0, 1.5), ylim=(0, 0.8))
    right.legend(loc="upper left")


def residual_space(figure: Figure) -> None:
    """The shapes of J, JᵀJ and JJᵀ."""
    axes = figure.subplots()
    few, many = 0.8, 3.0

    def matrix(x: float, wide: float, high: float, colour: str, name: str) -> None:
        axes.add_patch(Rectangle((x, -high / 2), wide, high, facecolor=colour, alpha=0.25, edgecolor=colour))
        axes.text(x + wide / 2, 0, name, ha="center", va="center", fontsize=13)

    matrix(0, many, few, BLUE, "J")
    axes.text(many / 2, -few / 2 - 0.3, "n weights", ha="center", color=MUTED)
    axes.text(-0.12, 0, "N", ha="right", va="center", color=MUTED)
    matrix(4.4, many, many, RED, "JᵀJ")
    axes.text(4.4 + many / 2, -many / 2 - 0.3, "n by n, of rank N", ha="center", color=MUTED)
    matrix(8.8, few, few, GREEN, "JJᵀ")
    axes.text(8.8 + few / 2, -few / 2 - 0.3, "N by N", ha="center", color=MUTED)
    axes.set(xlim=(-0.6, 10.2), ylim=(-2.1, 1.7), aspect="equal")
    axes.axis("off")


SIDES = {
    "imstep": ("imstep", RED), "imstep-residual": ("imstep", RED), "soap-cosine": ("SOAP, cosine schedule", GREEN),
    "soap": ("SOAP", VIOLET), "lbfgs": ("L-BFGS", BLUE), "adam": ("Adam", BROWN),
    "adam-lbfgs": ("Adam, then L-BFGS", BLUE),
}  # fmt: skip
RACE = "poisson-2d"


def start(figure: Figure) -> None:
    """A differential equation and training strength, from the records: the seed whose end is the median, over seconds.

    The equation is that of the race, by its error, once it is recorded; before, that of training strength, by its loss.
    """
    race = BENCHMARKS / "pinn" / "records" / f"{RACE}.json"
    strength = BENCHMARKS / "strength" / "records"
    equation = (race, 5, "error") if race.exists() else (strength / "convection-float64.json", 4, "training loss")
    panels = {"Differential equation": equation, "Autoencoder": (strength / "autoencoder.json", 4, "training loss")}
    labels = {}
    for axes, (title, (record, column, quantity)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        runs = json.loads(record.read_text())["runs"]
        for side, (label, colour) in SIDES.items():
            curves = [np.array(run["curve"], dtype=float) for run in runs if run["side"] == side]
            if not curves:
                continue
            ends = [curve[-1, column] for curve in curves]
            curve = curves[ends.index(statistics.median_low(ends))]
            (line,) = axes.loglog(np.maximum(curve[1:, 1], 0.1), curve[1:, column], color=colour, label=label)
            labels.setdefault(label, line)
        axes.set(title=title, xlabel="seconds", ylabel=quantity)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8.5)


PICTURES = {
    "complex-step": complex_step, "termination": termination, "best-rate": best_rate, "taylor-monitor": taylor_monitor,
    "residual-space": residual_space, "start": start,
}  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        save(name, PICTURES[name])
