"""Draws the pictures of the tutorials, from the variables that the tutorials' own programs leave.

python docs/_site/tutorials.py          # all, into docs/images
python docs/_site/tutorials.py fitting  # one
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from style import BLUE, BROWN, GREEN, INK, MUTED, RED, save
from torch import nn

import imstep
from imstep import spectral

ROOT = Path(__file__).resolve().parents[2]


def pinn(figure: Figure, v: dict[str, Any]) -> None:
    """The loss at new points, and the error on the square."""
    left, right = figure.subplots(1, 2)
    left.semilogy(v["history"], "o-", color=RED, markersize=3)
    left.set(title="Loss at points not seen before", xlabel="step", ylabel="loss")
    side = torch.linspace(0, 1, 80).double()
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        error = v["u"](grid)[:, 0] - torch.sin(math.pi * grid).prod(1)
    shown = right.imshow(error.abs().reshape(80, 80).T, origin="lower", extent=(0, 1, 0, 1), cmap="magma")
    right.set(title="Error of u", xlabel="x", ylabel="y")
    right.grid(False)
    figure.colorbar(shown, ax=right, format="%.0e")


def lbfgs(figure: Figure, v: dict[str, Any]) -> None:
    """Loss over cost of three optimizers."""
    axes = figure.subplots()
    for name, colour, style, label in (
        ("lbfgs", BLUE, "s--", "L-BFGS"),
        ("newton", GREEN, "^-", "NewtonKrylov"),
        ("squares", RED, "o-", "LeastSquares"),
    ):
        axes.semilogy(*zip(*v[name], strict=True), style, color=colour, markersize=4, label=label)
    axes.set(xlabel="gradient-equivalents", ylabel="training loss")
    axes.legend()


def fitting(figure: Figure, v: dict[str, Any]) -> None:
    """Measurements, curve and band."""
    axes = figure.subplots()
    low, high = v["middle"] - 2 * v["spread"], v["middle"] + 2 * v["spread"]
    axes.fill_between(v["later"], low, high, color=RED, alpha=0.2, linewidth=0, label="two standard errors")
    axes.plot(v["later"], v["middle"], color=RED, label="fit")
    axes.plot(v["t"], v["y"], "o", color=INK, markersize=3, label="measurements")
    axes.set(xlabel="t", ylabel="y")
    axes.legend()


def curvature(figure: Figure, v: dict[str, Any]) -> None:
    """The densities of the Hessian's and of Gauss-Newton's eigenvalues."""
    axes = figure.subplots()
    for operator, colour, style, label in ((v["H"], RED, "-", "Hessian"), (v["G"], BLUE, "--", "Gauss-Newton")):
        found = spectral.density(operator, steps=60, probes=8)
        axes.semilogy(found.grid, found.values.clamp(min=1e-6), style, color=colour, label=label)
    axes.plot(v["top"].values, torch.full((3,), 2e-4), "v", color=INK, markersize=5, label="three largest eigenvalues")
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-4, 50))
    axes.legend()


def recurrent(figure: Figure, v: dict[str, Any]) -> None:
    """Loss beside Adam's, and a series that continues by itself."""
    left, right = figure.subplots(1, 2)
    adam = _adam(v)
    cost = v["optimizer"].cost.gradient_equivalents
    spent = np.linspace(0, cost, len(v["history"]) + 1)[:-1]
    left.semilogy(spent, v["history"], "o-", color=RED, markersize=4, label="NewtonKrylov")
    left.semilogy(adam, color=BROWN, linestyle="--", label="Adam, 1e-2")
    left.set(title="Training loss", xlabel="gradients", xlim=(0, 300))
    left.legend()
    series, known = v["series"][0, :, 0], v["known"][0, :, 0]
    right.plot(series, color=RED, label="continued by the network")
    right.plot(known, "o", color=INK, markersize=4, label="given")
    right.axvline(len(known) - 1, color=MUTED, linewidth=1, linestyle=":")
    right.set(title="A wave goes on", xlabel="time", ylim=(-1.2, 2.4))
    right.legend(loc="upper right")


def _adam(v: dict[str, Any]) -> list[float]:
    """The same network trained by Adam."""
    torch.manual_seed(1)
    model, losses = v["Forecast"](), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(v["inputs"])[:, 5:], v["targets"][:, 5:])
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses


PICTURES = {"pinn": pinn, "lbfgs": lbfgs, "fitting": fitting, "curvature": curvature, "recurrent": recurrent}


def variables(page: Path) -> dict[str, Any]:
    """Run the page's programs as the tests do."""
    spec = importlib.util.spec_from_file_location("documentation", ROOT / "tests" / "documentation.py")
    assert spec is not None
    assert spec.loader is not None
    documentation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(documentation)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = documentation.run(page)
        os.chdir(ROOT)
    return found


if __name__ == "__main__":
    assert imstep.__version__
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PICTURES:
        left_over = variables(ROOT / "docs" / f"tutorial-{name}.md")
        save(f"tutorial-{name}", lambda figure, name=name, v=left_over: PICTURES[name](figure, v))
