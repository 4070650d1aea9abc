"""Minimising a function of one tensor, in the manner of SciPy."""

from __future__ import annotations

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
_METHODS: dict[str, type[NewtonKrylov] | type[LeastSquares]] = {
    "newton-krylov": NewtonKrylov,
    "least-squares": LeastSquares,
}
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class Termination(Enum):
    """Why :func:`minimize` ended; a member's value is its message."""

    CONVERGED = "the gradient norm is within the tolerance, and no direction of negative curvature was found"
    MAX_ITERATIONS = "the limit on iterations was reached"
    NO_PROGRESS = "several steps in a row lowered nothing or left every entry as it was: the precision is exhausted"
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
    callback: Callable[[StepRecord], bool | None] | None = None,
    **options: Any,
) -> MinimizeResult:
    """Minimise a smooth function of one tensor.

    Args:
        fun: maps a tensor like ``x0`` to a scalar tensor.
        x0: start; a real floating-point tensor, or what ``torch.as_tensor`` makes one of (NumPy arrays, lists).
        method: "newton-krylov", or "least-squares" for sums of squares.
        tol: ‖∇f‖ to reach, > 0; default 1e-8 in float64, 1e-4 in float32.
        maxiter: steps at most, >= 1.
        callback: called after every step with its record; a true answer stops.
        options: strategies of :class:`NewtonKrylov`, such as ``step=TaylorMonitor(theta=0.1)``, or of
            :class:`LeastSquares`.

    Returns:
        A :class:`MinimizeResult`; ending without convergence is a termination, not an exception.

    Raises:
        ValueError: unknown method, a number out of range, ``fun`` returns no scalar.
        TypeError: ``x0`` is not real floating point, or an unknown option.

    Source: the interface follows ``scipy.optimize.minimize``.

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
        raise TypeError(f"x0 has dtype {start.dtype}; it must be real floating point. Convert it with .double().")
    tol = _TOLERANCE.get(start.dtype, 1e-3) if tol is None else tol
    x = nn.Parameter(start.detach().clone())
    optimizer = _METHODS[method]([x], tolerance=tol, **options)
    records: list[StepRecord] = []
    termination = _run(optimizer, x, lambda: fun(x), records, maxiter, callback)
    cost = optimizer.cost
    assert x.grad is not None
    if records[-1].accepted:  # .grad belongs to the point before the last step
        x.grad = torch.autograd.grad(fun(x), x)[0]
    return MinimizeResult(
        x=x.detach(),
        fun=records[-1].new_loss,
        grad=x.grad.detach(),
        nit=sum(r.outcome is not StepOutcome.CONVERGED for r in records),
        nhev=cost.products,
        nfev=cost.linearisations + cost.gradients + cost.losses,
        success=termination is Termination.CONVERGED,
        termination=termination,
        records=tuple(records),
    )


def _run(
    optimizer: StepwiseOptimizer,
    x: Tensor,
    closure: Callable[[], Tensor],
    records: list[StepRecord],
    maxiter: int,
    callback: Callable[[StepRecord], bool | None] | None,
) -> Termination:
    failures = 0
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
        if failures >= PATIENCE:
            finite = record.outcome is not StepOutcome.NON_FINITE
            return Termination.NO_PROGRESS if finite else Termination.NON_FINITE
    return Termination.MAX_ITERATIONS
