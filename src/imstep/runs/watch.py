"""The curvature of the training loss, measured now and then while a run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from imstep import spectral
from imstep.runs.matrices import curvature, undisturbed
from imstep.runs.rows import CurvatureRow, Row, StepRow
from imstep.runs.runner import Trainer

__all__ = ["CurvatureWatch", "edge_of_stability"]

POINTS = 160
"""Of a density's grid: a line of the record stays below ten kilobytes."""


@dataclass(frozen=True)
class CurvatureWatch:
    """Measures the Hessian of the mean training loss at the start and every so many steps.

    It is taken over the whole training set, in evaluation mode. Random vectors are the same each time, so that what
    changes is the matrix. Nothing of the run's is touched: its numbers are those of a run that is not watched.

    Args:
        every: steps, >= 1.
        tol: of the largest eigenvalue, relative.
        rtol: of the trace.
        steps, probes: of the density.

    Cost: 100 to 300 Hessian products over the training set each time, not charged.
    """

    every: int
    tol: float = 1e-3
    rtol: float = 0.05
    steps: int = 30
    probes: int = 4

    def __call__(self, trainer: Trainer, row: Row) -> CurvatureRow | None:
        """The measurement that is due after this row; None if none is."""
        due = row.step % self.every == 0 if isinstance(row, StepRow) else row.step == 0
        return self._measured(trainer, row) if due else None

    def _measured(self, trainer: Trainer, row: Row) -> CurvatureRow:
        start, problem = time.perf_counter(), trainer.problem
        with undisturbed(problem):
            H = curvature(problem, "hessian")
            top = spectral.eigenpairs(H, 1, "LA", self.tol)
            trace = spectral.trace(H, self.rtol, max_products=200)
            density = spectral.density(H, self.steps, self.probes, points=POINTS)
        return CurvatureRow(
            row.step, row.epoch, row.cost, row.seconds,
            largest=float(top.values[0]),
            residual_norm=float(top.residual_norms[0]),
            trace=trace.value,
            trace_error=trace.error,
            density=_rounded(density),
            edge=edge_of_stability(trainer.stepper.optimizer),
            products=top.products + trace.products + density.products,
            measuring_seconds=time.perf_counter() - start,
        )  # fmt: skip


def _rounded(density: spectral.SpectralDensity) -> dict[str, Any]:
    """The density in few digits: it is read by eye."""
    short = lambda values: [float(f"{value:.4g}") for value in values.tolist()]
    return {name: short(getattr(density, name)) for name in ("grid", "values", "error")} | {"width": density.width}


def edge_of_stability(optimizer: torch.optim.Optimizer) -> float | None:
    """The largest eigenvalue of the Hessian along which gradient descent with a full batch does not grow.

        2 / lr;   (2 + 2β) / lr with momentum β;   (2 + 2β) / (lr (1 + 2β)) with Nesterov's

    Returns:
        None where no such number belongs to the optimizer: it rescales gradients, as Adam does, or uses curvature.

    Source: Cohen, Kaur, Li, Kolter and Talwalkar, ICLR 2021 (arXiv 2103.00065), section 2 and appendix B.
    """
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if not lr > 0 or group["maximize"]:
        return None
    # A dampened gradient is a smaller learning rate; weight decay adds its part to every eigenvalue.
    lr *= 1 - float(group["dampening"]) if momentum > 0 else 1.0
    nesterov = 1 + 2 * momentum if group["nesterov"] else 1.0
    return (2 + 2 * momentum) / (lr * nesterov) - float(group["weight_decay"]) if lr > 0 else None
