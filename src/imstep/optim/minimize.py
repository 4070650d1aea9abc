"""Minimising a function of one tensor, in the manner of SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from imstep.globalization import Armijo, ContractionDamping
from imstep.optim.arguments import check_options, start_of, told, units_of, value_of
from imstep.optim.box import Box, box_of
from imstep.optim.least_squares import LeastSquares
from imstep.optim.minimize_result import MinimizeResult
from imstep.optim.newton_krylov import NewtonKrylov
from imstep.optim.record import StepOutcome, StepRecord
from imstep.optim.scaling import ColumnNorms
from imstep.optim.stationarity import Stationarity
from imstep.optim.stepwise import NonFiniteLossError, StepwiseOptimizer
from imstep.optim.stopping_tests import Course, Termination, Tolerances
from imstep.uncompiled import uncompiled

PATIENCE = 8
"""Steps in a row that leave every entry as it was."""

STAGNATION = 10
"""Steps in a row, none of which lowers the least loss or the least gradient norm so far."""

FROM_AFAR = ContractionDamping(shrink=2.0, shrink_again=2.0)
"""Of fits, which begin far away and whose steps are cheap: a λ that falls faster, or waits, leads some astray."""

_METHODS = ("newton-krylov", "least-squares")


@uncompiled
def minimize(
    fun: Callable[[Tensor], Tensor],
    x0: Any,
    method: str = "newton-krylov",
    *,
    ftol: float | None = None,
    xtol: float | None = None,
    gtol: float | None = None,
    tol: float | None = None,
    maxiter: int = 1000,
    bounds: Any = None,
    scale: Any = None,
    callback: Callable[..., bool | None] | None = None,
    **options: Any,
) -> MinimizeResult:
    """Minimise a smooth function of one tensor.

    The end is a minimum to second order: where steps become small, Newton's full step s from there is computed, and
    directions of negative curvature are looked for. Lengths are measured with D from the columns of the Hessian, so
    that no unit of f or x enters; curvature and gradient within rounding count as none.

        gtol:  q(s) <= gtol² |f|,  q the decrease by Newton's model: for sums of squares, the squared cosine between
               the residuals and all that the columns of their Jacobian span
        xtol:  ‖D s‖ <= xtol ‖D x‖
        ftol:  the decrease of the last step, actual and predicted, and q(s) are at most ftol |f|

    Args:
        fun: maps a tensor like ``x0`` to a scalar tensor.
        x0: start; a real floating-point tensor, or what ``torch.as_tensor`` makes one of (NumPy arrays, lists).
        method: "newton-krylov", or "least-squares" for sums of squares.
        ftol, xtol, gtol: >= 0, one that is met is enough; 0 for none. Default ε^(2/3) for xtol and gtol, ε^(4/3) for
            ftol, ε the spacing of the dtype: 4e-11 and 1e-21 in float64.
        tol: an absolute bound on ‖scale ∇f‖, in the units of f, for that test alone in place of the defaults.
        maxiter: steps at most, >= 0; 0 to look at ``x0`` only.
        bounds: for "least-squares", as SciPy takes them: an object with ``lb`` and ``ub`` (``scipy.optimize.Bounds``);
            a pair (lower, upper) of tensors, arrays or numbers; or one pair for each entry, None for no bound, or an
            array (n, 2) of pairs. Two pairs of plain numbers for two entries are one for each entry. Equal ones hold an
            entry. ``x0`` lies within.
        scale: the typical size of each entry, > 0, such as ``x0.abs()``; a number, or of the shape of ``x0``. Lengths,
            damping and the records' norms are then those of ``x / scale``. None for what the columns of the Jacobian
            say, :class:`ColumnNorms`, with "least-squares"; else for ``x0.abs()`` where the sizes of up to 100 entries
            differ by more than 1e4, or leave squares little room in the range of their dtype (4e9 and 2e-10 in
            float32), none of them 0, and for 1 otherwise.
        callback: called after every step, as SciPy's: with a copy of x, or, if its only parameter is named
            ``intermediate_result``, with an object that has ``x``, ``fun``, ``nit`` and ``record``. Raising
            ``StopIteration``, or returning True, stops.
        options: strategies of :class:`NewtonKrylov`, such as ``step=TaylorMonitor(theta=0.1)``, or of
            :class:`LeastSquares`. By default steps of the former start at the model's minimiser, backtrack and go
            forward, as is best on known functions: ``Armijo(forward=2)``, up to 30 trials; the damping of the latter
            falls by half at most.

    Returns:
        A :class:`MinimizeResult`; ending without convergence is a termination, not an exception.

    Raises:
        ValueError: unknown method, a number out of range, ``fun`` returns no scalar, ``x0`` outside the bounds.
        TypeError: ``x0`` is not real floating point, or an unknown option.

    Cost: beside the steps, an evaluation and n products (up to 132 beyond 100 variables) for each look at a point,
        about one or two a run.

    Source: the interface follows ``scipy.optimize.minimize``; the tests MINPACK's (Moré, Garbow and Hillstrom, User
        guide for MINPACK-1, 1980, section 2.3), for any function and with Newton's step in place of the last one;
        ``scale`` is ``typx`` of Dennis and Schnabel, Numerical Methods for Unconstrained Optimization (1983),
        section 7.1.

    Example:
        >>> result = minimize(lambda x: ((x - 3) ** 4).sum() + (x ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> result.success, bool(result.grad.norm() < 1e-8)
        (True, True)
    """
    if method not in _METHODS:
        raise ValueError(f"there is no method {method!r}. Methods: {', '.join(map(repr, _METHODS))}.")
    if not (isinstance(maxiter, Real) and maxiter >= 0):
        raise ValueError(f"maxiter is at least 0, the number of steps at most, got {maxiter!r}.")
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback is a function of x, called after every step, or None; got {callback!r}.")
    start = start_of(x0)
    tolerances = Tolerances.chosen(start.dtype, tol, ftol, xtol, gtol)
    units = units_of(scale, start, guess=method != "least-squares")
    box = box_of(bounds, start, units)
    y = nn.Parameter(start.detach() / units if box is None else box.clamped(start.detach() / units))
    point = lambda: y if units.dim() == 0 and units == 1 else units * y
    optimizer = _optimizer(method, y, box, scale is None, {"tolerance": tolerances.tol, **options})
    value = value_of(fun, method == "least-squares")
    run = _Run(optimizer, y, lambda: value(point()), tolerances, maxiter, told(callback, point))
    termination = run.whole()
    gradient, evaluations = run.gradient()
    cost = optimizer.cost
    with_gradient = cost.linearisations + cost.gradients + evaluations
    return MinimizeResult(
        x=point().detach(),
        fun=run.loss,
        grad=gradient / units,
        nit=len(run.records),
        nfev=with_gradient + cost.losses,
        njev=with_gradient + cost.jacobian_passes,
        nhev=cost.products,
        termination=termination,
        records=tuple(run.records),
    )


def _optimizer(
    method: str, x: nn.Parameter, box: Box | None, unscaled: bool, options: dict[str, Any]
) -> StepwiseOptimizer:
    """The optimizer of a method, with what :func:`minimize` chooses for functions of unknown units."""
    check_options(options, method, LeastSquares if method == "least-squares" else NewtonKrylov)
    if method == "least-squares":
        scaling = {"scaling": ColumnNorms()} if unscaled else {}
        return LeastSquares([x], box=box, **{"damping": FROM_AFAR, **scaling, **options})
    if box is not None:
        raise ValueError(
            f'method "{method}" takes no bounds. Use method="least-squares" for sums of squares, or write the bounded '
            "entries as smooth functions of free ones, such as lower + (upper - lower) * y.sigmoid()."
        )
    return NewtonKrylov([x], **{"step": Armijo(forward=2.0), "max_trials": 30, "between": None, **options})


class _Run:
    """A minimisation under way."""

    def __init__(
        self,
        optimizer: StepwiseOptimizer,
        x: Tensor,
        closure: Callable[[], Tensor],
        tolerances: Tolerances,
        maxiter: int,
        stops: Callable[[float, list[StepRecord]], bool],
    ) -> None:
        self._optimizer, self._x, self._closure = optimizer, x, closure
        self._maxiter, self._stops = maxiter, stops
        by_residuals, rounding = isinstance(optimizer, LeastSquares), torch.finfo(x.dtype).eps / 2
        self._course = Course(tolerances, rounding, x.detach().abs(), by_residuals)
        self.records: list[StepRecord] = []
        self.loss = math.nan

    def whole(self) -> Termination:
        """Step until there is a reason to end."""
        failures = stagnation = 0
        least_loss = least_norm = math.inf
        while len(self.records) < self._maxiter:
            before = self._x.detach().clone()
            record = self._stepped()
            if record is None:
                return Termination.NON_FINITE
            if record.outcome is StepOutcome.CONVERGED:
                steps, reached = len(self.records), self._course.tolerances.tol
                end = self._look()
                if end is not None or len(self.records) == steps:
                    return end or (Termination.CONVERGED if reached else Termination.GRADIENT)
                continue
            if self._took(before, record):
                return Termination.STOPPED
            if self._course.unbounded:
                return Termination.UNBOUNDED
            if self._course.worth_a_look(self._x.detach()) and (
                end := self._look(stalled=not record.accepted)
            ):
                return self._polished(end)
            # An accepted step may be too short to change any entry of x.
            failures = failures + 1 if torch.equal(self._x, before) else 0
            # Where losses differ by rounding only, steps may go to and fro for ever.
            if record.went_back:  # the least loss was met where nobody can stay
                least_loss = math.inf
            lower = record.new_loss < least_loss or record.gradient_norm < least_norm
            stagnation = 0 if lower else stagnation + 1
            least_loss, least_norm = min(least_loss, record.new_loss), min(least_norm, record.gradient_norm)
            if failures >= PATIENCE or stagnation >= STAGNATION:
                if record.outcome is StepOutcome.NON_FINITE:
                    return Termination.NON_FINITE
                steps = len(self.records)
                end = self._look(stalled=True, typical=self._course.largest)
                if end is not None or len(self.records) == steps:
                    return end or Termination.NO_PROGRESS
                failures = stagnation = 0
        end = self._look() or Termination.MAX_ITERATIONS
        return end if math.isfinite(self.loss) else Termination.NON_FINITE

    def _polished(self, end: Termination) -> Termination:
        """A last step for least squares, which takes the point from within the tolerances to within rounding."""
        wanted = isinstance(self._optimizer, LeastSquares) and end.success and end is not Termination.PRECISION
        if not wanted or len(self.records) >= self._maxiter:
            return end
        before = self._x.detach().clone()
        record = self._stepped()
        stopped = record is not None and record.accepted and self._took(before, record)
        return Termination.STOPPED if stopped else end

    def gradient(self) -> tuple[Tensor, int]:
        """At the last point, and how many evaluations it took."""
        last = self._optimizer.last_step
        if self._x.grad is None or (last is not None and last.accepted):  # .grad is of where the last step began
            return torch.autograd.grad(self._closure(), self._x)[0].detach(), 1
        return self._x.grad, 0

    def _stepped(self) -> StepRecord | None:
        """The record of a step; None where loss or gradient have not been finite for long."""
        try:
            self._optimizer.step(self._closure)
        except NonFiniteLossError:
            return None
        record = self._optimizer.last_step
        assert record is not None
        self.loss = record.new_loss
        return record

    def _took(self, before: Tensor, record: StepRecord) -> bool:
        """Take in a step; whether the callback wants to stop."""
        self.records.append(record)
        self._course.went(before, self._x.detach(), record)
        return self._stops(self.loss, self.records)

    def _look(self, stalled: bool = False, typical: Tensor | None = None) -> Termination | None:
        """Whether the point is a minimum, and by what test; at a saddle, leave it, which is a step.

        Args:
            stalled: see :meth:`Course.verdict`.
            typical: sizes of entries, in place of those of the course.
        """
        ends: list[Termination | None] = []

        def stationary(loss: float, found: Stationarity) -> bool:
            end = self._course.verdict(loss, found, stalled)
            ends.append(Termination.FLAT if end and self._course.flat(loss, found) else end)
            return ends[0] is not None

        before = self._x.detach().clone()
        course, may_leave = self._course, len(self.records) < self._maxiter
        typical = course.typical if typical is None else typical
        record = self._optimizer.examine(self._closure, stationary, typical, may_leave, course.crawls)
        self.loss = record.new_loss
        if record.outcome is StepOutcome.CONVERGED:
            return ends[0]
        if record.accepted:
            return Termination.STOPPED if self._took(before, record) else None
        self._course.in_vain()
        return None
