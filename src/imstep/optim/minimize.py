"""Minimising a function of one tensor, in the manner of SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from imstep.optim.least_squares import LeastSquares
from imstep.optim.newton_krylov import NewtonKrylov
from imstep.optim.record import StepOutcome, StepRecord
from imstep.optim.stepwise import NonFiniteLossError, StepwiseOptimizer

PATIENCE = 3
"""Steps in a row that leave every entry as it was."""

STAGNATION = 10
"""Steps in a row, none of which lowers the least loss or the least gradient norm so far."""

_METHODS: dict[str, type[NewtonKrylov] | type[LeastSquares]] = {
    "newton-krylov": NewtonKrylov,
    "least-squares": LeastSquares,
}
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class Termination(Enum):
    """Why :func:`minimize` ended; a member's value is its message."""

    CONVERGED = "the gradient norm is within the tolerance, and no direction of negative curvature was found"
    MAX_ITERATIONS = "the limit on iterations was reached"
    NO_PROGRESS = (
        "several steps in a row lowered nothing or left every entry as it was: the precision is exhausted; "
        "where entries differ by orders of magnitude, give minimize their scale"
    )
    NON_FINITE = "the function or its gradient is not finite at the last point"
    STOPPED = "the callback asked to stop"


@dataclass(frozen=True, eq=False)
class MinimizeResult:
    """What :func:`minimize` found.

    Attributes:
        x: the best point, of the shape and dtype of x0.
        fun: the function there.
        grad: its gradient there, of the shape of ``x``.
        nit: steps taken.
        nhev: products with the Hessian.
        nfev: evaluations of the function, with or without a gradient.
        success: whether it converged.
        termination: why it ended.
        records: one :class:`StepRecord` a step.
    """

    x: Tensor
    fun: float
    grad: Tensor
    nit: int
    nhev: int
    nfev: int
    success: bool
    termination: Termination
    records: tuple[StepRecord, ...]

    @property
    def message(self) -> str:
        """A sentence that explains the termination."""
        return self.termination.value


def minimize(
    fun: Callable[[Tensor], Tensor],
    x0: Any,
    method: str = "newton-krylov",
    *,
    tol: float | None = None,
    maxiter: int = 1000,
    scale: Any = None,
    callback: Callable[[StepRecord], bool | None] | None = None,
    **options: Any,
) -> MinimizeResult:
    """Minimise a smooth function of one tensor.

    Args:
        fun: maps a tensor like ``x0`` to a scalar tensor.
        x0: start; a real floating-point tensor, or what ``torch.as_tensor`` makes one of (NumPy arrays, lists).
        method: "newton-krylov", or "least-squares" for sums of squares.
        tol: ‖scale ∇f‖ to reach, > 0; default 1e-8 in float64, 1e-4 in float32.
        maxiter: steps at most, >= 1.
        scale: the typical size of each entry, > 0, such as ``x0.abs()``; a number, or of the shape of ``x0``. Lengths,
            damping and the records' norms are then those of ``x / scale``. None for 1.
        callback: called after every step with its record; a true answer stops.
        options: strategies of :class:`NewtonKrylov`, such as ``step=TaylorMonitor(theta=0.1)``, or of
            :class:`LeastSquares`.

    Returns:
        A :class:`MinimizeResult`; ending without convergence is a termination, not an exception.

    Raises:
        ValueError: unknown method, a number out of range, ``fun`` returns no scalar.
        TypeError: ``x0`` is not real floating point, or an unknown option.

    Source: the interface follows ``scipy.optimize.minimize``; ``scale`` is ``typx`` of Dennis and Schnabel, Numerical
        Methods for Unconstrained Optimization (1983), section 7.1.

    Example:
        >>> result = minimize(lambda x: ((x - 3) ** 4).sum() + (x ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> result.success, bool(result.grad.norm() < 1e-8)
        (True, True)
    """
    if method not in _METHODS:
        raise ValueError(f"there is no method {method!r}. Methods: {', '.join(map(repr, _METHODS))}.")
    if maxiter < 1:
        raise ValueError(f"maxiter is at least 1, got {maxiter}.")
    start = torch.as_tensor(x0)
    if not start.is_floating_point():
        pairs = "Pass torch.view_as_real(x0) and join the pairs in the function by torch.view_as_complex."
        remedy = pairs if start.is_complex() else "Convert it with .double()."
        raise TypeError(f"x0 has dtype {start.dtype}; it must be real floating point. {remedy}")
    tol = _TOLERANCE.get(start.dtype, 1e-3) if tol is None else tol
    units = _units(scale, start)
    y = nn.Parameter(start.detach() / units)
    point = lambda: y if scale is None else units * y
    optimizer = _METHODS[method]([y], tolerance=tol, **options)
    records: list[StepRecord] = []
    termination = _run(optimizer, y, lambda: fun(point()), records, maxiter, callback)
    cost = optimizer.cost
    assert y.grad is not None
    if records[-1].accepted:  # .grad belongs to the point before the last step
        y.grad = torch.autograd.grad(fun(point()), y)[0]
    return MinimizeResult(
        x=point().detach(),
        fun=records[-1].new_loss,
        grad=y.grad.detach() / units,
        nit=sum(r.outcome is not StepOutcome.CONVERGED for r in records),
        nhev=cost.products,
        nfev=cost.linearisations + cost.gradients + cost.losses,
        success=termination is Termination.CONVERGED,
        termination=termination,
        records=tuple(records),
    )


def _units(scale: Any, start: Tensor) -> Tensor:
    """The scale as a tensor like the start."""
    units = torch.as_tensor(1.0 if scale is None else scale, dtype=start.dtype, device=start.device).detach()
    if units.dim() and units.shape != start.shape:
        raise ValueError(
            f"scale has shape {tuple(units.shape)}, x0 {tuple(start.shape)}. Give one number, or one for each entry."
        )
    if not bool(((units > 0) & units.isfinite()).all()):
        raise ValueError("scale must be positive and finite. Put 1 where an entry's size is not known.")
    return units


def _run(
    optimizer: StepwiseOptimizer,
    x: Tensor,
    closure: Callable[[], Tensor],
    records: list[StepRecord],
    maxiter: int,
    callback: Callable[[StepRecord], bool | None] | None,
) -> Termination:
    failures = stagnation = 0
    least_loss = least_norm = math.inf
    for _ in range(maxiter + 1):  # the last one only to see whether the last point is stationary
        before = x.detach().clone()
        try:
            optimizer.step(closure)
        except NonFiniteLossError:
            return Termination.NON_FINITE
        record = optimizer.last_step
        assert record is not None
        records.append(record)
        if record.outcome is StepOutcome.CONVERGED:
            return Termination.CONVERGED
        if callback is not None and callback(record):
            return Termination.STOPPED
        # An accepted step may be too short to change any entry of x.
        failures = failures + 1 if torch.equal(x, before) else 0
        # Where losses differ by rounding only, steps may go to and fro for ever.
        lower = record.new_loss < least_loss or record.gradient_norm < least_norm
        stagnation = 0 if lower else stagnation + 1
        least_loss, least_norm = min(least_loss, record.new_loss), min(least_norm, record.gradient_norm)
        if failures >= PATIENCE or stagnation >= STAGNATION:
            finite = record.outcome is not StepOutcome.NON_FINITE
            return Termination.NO_PROGRESS if finite else Termination.NON_FINITE
    return Termination.MAX_ITERATIONS
