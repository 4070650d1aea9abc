"""The Newton-Krylov optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.choice import CurvatureChoice, GaussNewtonFirst
from imstep.curvature.frozen import FrozenClosure, Linearisation
from imstep.curvature.hessian import TapeOperator, hessian_of
from imstep.curvature.layers import LayerObserver
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Damping, LevenbergMarquardt, LineModel, StepSearch, TaylorMonitor
from imstep.linalg import LinearOperator
from imstep.optim.direction import Direction, escape_direction, krylov_direction
from imstep.optim.forcing import BestRateForcing, Forcing, Situation
from imstep.optim.memory import Memory
from imstep.optim.preconditioning import Kronecker, Preconditioning
from imstep.optim.record import (
    GAUSS_NEWTON_PRODUCT_COST,
    HESSIAN_PRODUCT_COST,
    LOSS_COST,
    Cost,
    StepOutcome,
    StepRecord,
)
from imstep.optim.trials import Trials, try_escape, try_steps

CONFIDENCE = 0.6


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient was not finite in several steps in a row."""


class NewtonKrylov(torch.optim.Optimizer):
    """Newton's method with Krylov solves, safeguarded by monitoring the Taylor error; no step size to set.

    One step evaluates the closure's loss and gradient and records the gradient's derivative; solves the damped Newton
    system by conjugate gradients, ended by the first disturbing direction or when further products do not
    pay; and moves along the solution as far as the quadratic model proves right:

        (A + λI) d = -g,   w <- w + t d,   t from ``step`` by the measured error E(t) = f(w + t d) - m(t)

    Data, random numbers and buffers are the same for all evaluations of one step. A step that cannot be
    accepted leaves parameters and buffers bit for bit as they were.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone.
        curvature: which matrix A is: by default Gauss-Newton where the loss is a convex function of the
            model's outputs, else the Hessian; ``ExactHessian()`` for the Hessian always.
        forcing: how accurately the system is solved.
        step: how the step length is chosen.
        damping: how λ develops; its numbers are relative to the curvature along the first gradient.
        preconditioning: of the Krylov iteration.
        tolerance: ‖g‖ at which a point counts as stationary, >= 0; then negative curvature is looked for.
        max_trials: step lengths tried per step, >= 1.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.
        curvature_floor: least curvature per ‖p‖² of a direction p that does not disturb, >= 0.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first.
        cost: everything spent so far.

    Raises:
        ValueError, TypeError: no parameter requires gradients; parameters are complex, integer or on several
            devices; a number is out of range.

    Source: Shen et al., arXiv 2009.07098, for the method (complex step, termination at disturbing directions, monitored
        Taylor error); the rules that make it concrete, and all defaults, are our own.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> optimizer = NewtonKrylov([w])
        >>> rosenbrock = lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2
        >>> for _ in range(40):
        ...     loss = optimizer.step(rosenbrock)
        >>> bool(rosenbrock() < 1e-12)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: CurvatureChoice | None = None,
        forcing: Forcing | None = None,
        step: StepSearch | None = None,
        damping: Damping | None = None,
        preconditioning: Preconditioning | None = None,
        tolerance: float = 1e-12,
        max_trials: int = 12,
        max_refusals: int = 5,
        curvature_floor: float = 0.0,
    ) -> None:
        if not tolerance >= 0 or not curvature_floor >= 0:
            raise ValueError(f"tolerance and curvature_floor are at least 0, got {tolerance} and {curvature_floor}.")
        if max_trials < 1 or max_refusals < 1:
            raise ValueError(f"max_trials and max_refusals are at least 1, got {max_trials} and {max_refusals}.")
        super().__init__(params, {})
        self._preconditioning = preconditioning or Kronecker()
        self._parameters = _vector(self.param_groups)
        self._preconditioner = self._preconditioning.make(self._parameters)
        self._curvature = curvature or GaussNewtonFirst()
        self._forcing = forcing or BestRateForcing()
        self._search = step or TaylorMonitor()
        self._damping = damping or LevenbergMarquardt()
        self._tolerance, self._curvature_floor = tolerance, curvature_floor
        self._max_trials, self._max_refusals = max_trials, max_refusals
        self._memory = Memory(search=self._search.initial(), damping=self._damping.initial)
        self.last_step: StepRecord | None = None
        self.cost = Cost()

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss, a tensor with one entry. It may also call ``zero_grad()`` and
                ``loss.backward()``, as for L-BFGS. It is evaluated several times.

        Returns:
            The loss before the step, 0-dim, detached. ``.grad`` of the parameters is the gradient there.

        Raises:
            TypeError: no closure.
            ValueError: the closure returned no scalar with a graph, or one that no parameter influences.
            NonFiniteLossError: too many steps in a row met a loss or gradient that is not finite.
        """
        if closure is None:
            raise TypeError("NewtonKrylov.step needs a closure that evaluates the model and returns the loss.")
        started = time.perf_counter()
        self._follow_parameters()
        attempt = _Attempt(self, FrozenClosure(closure, self._parameters))
        before = self._preconditioner.state_dict()
        try:
            record, memory = attempt.run()
        except BaseException:  # an interrupt as well: the next step finds everything as this one did
            attempt.undo()
            self._preconditioner.load_state_dict(before)
            raise
        attempt.leave()
        if record.outcome is StepOutcome.NON_FINITE:
            self._preconditioner.load_state_dict(before)
        self._memory = replace(memory, steps=memory.steps + 1)
        self.last_step = replace(record, seconds=time.perf_counter() - started)
        self.cost = self.cost + record.cost
        for p, g in zip(self._parameters.tensors, self._parameters.unflatten(attempt.point.gradient), strict=True):
            p.grad = g.clone()
        if memory.refusals >= self._max_refusals:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite in {memory.refusals} steps in a row "
                f"(last loss: {record.loss}). "
                "Parameters are unchanged since. Look for an empty batch, a logarithm or division at zero, or bad data."
            )
        return attempt.point.loss.detach()

    def _follow_parameters(self) -> None:
        """Take up parameters that were added, frozen or unfrozen since; the preconditioner then starts afresh."""
        parameters = _vector(self.param_groups)
        if list(map(id, parameters.tensors)) != list(map(id, self._parameters.tensors)):
            self._parameters = parameters
            self._preconditioner = self._preconditioning.make(parameters)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit; tensors, numbers, strings, lists and dictionaries."""
        state = super().state_dict()
        state["newton_krylov"] = {
            "memory": self._memory.to_dict(),
            "cost": asdict(self.cost),
            "shapes": [list(p.shape) for p in self._parameters.tensors],
            "preconditioner": self._preconditioner.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; strategies are those given to the constructor.

        Raises:
            ValueError: the state belongs to another optimizer, or to other parameters.
        """
        if "newton_krylov" not in state_dict:
            raise ValueError(
                "this state was not saved by NewtonKrylov (it has no entry 'newton_krylov'). "
                "Load it into the optimizer that saved it."
            )
        own = state_dict["newton_krylov"]
        self._follow_parameters()
        shapes = [list(p.shape) for p in self._parameters.tensors]
        if own.get("shapes") != shapes:
            raise ValueError(
                f"this state belongs to parameters of shapes {own.get('shapes')}, the optimizer has {shapes}. "
                "Load it into an optimizer of the same model, with the same parameters frozen."
            )
        try:
            memory, cost, preconditioner = Memory.from_dict(own["memory"]), Cost(**own["cost"]), own["preconditioner"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this state is damaged or of another version of the library: {error}.") from error
        self._preconditioner.load_state_dict(preconditioner)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "newton_krylov"})
        self._memory, self.cost = memory, cost


def _vector(groups: list[dict[str, Any]]) -> ParameterVector:
    return ParameterVector(p for group in groups for p in group["params"])


@dataclass(frozen=True, eq=False)
class _Setting:
    """What the Krylov iteration of a step works with."""

    candidates: list[TapeOperator]
    preconditioner: LinearOperator | None
    damping: float
    situation: Situation

    @property
    def products(self) -> Cost:
        """The products made so far."""
        return Cost(
            gauss_newton_products=sum(a.products for a in self.candidates if a.definite),
            hessian_products=sum(a.products for a in self.candidates if not a.definite),
        )


class _Attempt:
    """One step: everything between the first evaluation on a batch and the last."""

    def __init__(self, optimizer: NewtonKrylov, frozen: FrozenClosure) -> None:
        self._optimizer, self._frozen = optimizer, frozen
        self._parameters = optimizer._parameters
        self._snapshot = self._parameters.snapshot()
        self._keep = False
        self.point: Linearisation

    def run(self) -> tuple[StepRecord, Memory]:
        """The record of the step and what to remember."""
        optimizer, memory = self._optimizer, self._optimizer._memory
        observer = optimizer._preconditioner.observer()
        self.point = self._frozen.linearise(observer)
        loss, gradient_norm = float(self.point.loss.detach()), float(self.point.gradient.norm())
        record = StepRecord(
            step=memory.steps,
            outcome=StepOutcome.ACCEPTED,
            status=None,
            loss=loss,
            new_loss=loss,
            gradient_norm=gradient_norm,
            radius=memory.search.radius,
            cost=Cost(linearisations=1),
        )
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return replace(record, outcome=StepOutcome.NON_FINITE), replace(memory, refusals=memory.refusals + 1)
        shrunk = memory.full_steps >= 2 and gradient_norm < memory.gradient_norm
        contraction = gradient_norm / memory.gradient_norm if shrunk else 1.0
        # On ill-conditioned problems ‖g‖ does not fall from step to step, but that the model stays right tells as much.
        contraction = min(contraction, CONFIDENCE ** max(memory.full_steps - 2, 0))
        memory = memory.meet(gradient_norm)
        if gradient_norm <= optimizer._tolerance:
            return self._escape(record, memory)
        cost = self._refresh(observer)
        setting, memory = self._set_up(memory, record.cost + cost, contraction)
        direction, memory = self._solve(setting, memory)
        record = replace(
            record,
            status=direction.status,
            iterations=direction.iterations,
            products=setting.products.products,
            damping=setting.damping,
            cost=record.cost + cost + setting.products,
        )
        return self._move(record, memory, direction)

    def leave(self) -> None:
        """Put back what must not stay: after a rejected step everything, else what later evaluations did."""
        if not self._keep:
            self._parameters.restore(self._snapshot)
        self._frozen.leave(self._keep)

    def undo(self) -> None:
        """Put back everything, as if the step had not been tried."""
        self._parameters.restore(self._snapshot)
        self._frozen.undo()

    # --- direction ----------------------------------------------------------------------------------------------

    def _refresh(self, observer: LayerObserver | None) -> Cost:
        if observer is None or self.point.split is None or not observer.uses:
            return Cost()
        self._optimizer._preconditioner.refresh(self.point, observer)
        return Cost(refreshes=1)

    def _set_up(self, memory: Memory, cost: Cost, contraction: float) -> tuple[_Setting, Memory]:
        optimizer = self._optimizer
        relative_gradient = memory.gradient_norm / memory.largest_gradient_norm
        candidates = optimizer._curvature.candidates(
            self.point, self._parameters, memory.progress, probe=memory.probe_in == 0
        )
        if memory.curvature_scale == 0.0:
            unit = self.point.gradient / memory.gradient_norm
            scale = abs(float(unit @ (candidates[-1] @ unit)))
            memory = replace(memory, curvature_scale=scale if 0 < scale < math.inf else 1.0)
        # Vanishes with the gradient, so that damping does not spoil superlinear convergence.
        damping = memory.damping * memory.curvature_scale * math.sqrt(relative_gradient)
        situation = Situation(
            relative_gradient=relative_gradient,
            contraction=contraction,
            last_products=memory.products,
            fixed_cost=cost.gradient_equivalents + LOSS_COST,
            product_cost=GAUSS_NEWTON_PRODUCT_COST if candidates[-1].definite else HESSIAN_PRODUCT_COST,
        )
        return _Setting(candidates, optimizer._preconditioner.operator(damping), damping, situation), memory

    def _solve(self, setting: _Setting, memory: Memory) -> tuple[Direction, Memory]:
        """The direction by the first candidate that does not prove indefinite, or else by the last."""
        for operator in setting.candidates:
            direction = krylov_direction(
                operator,
                self.point.gradient,
                damping=setting.damping,
                preconditioner=setting.preconditioner,
                stopping=self._optimizer._forcing.rules(setting.situation),
                curvature_floor=self._optimizer._curvature_floor,
            )
            if not direction.status.disturbing:
                break
        tried = len(setting.candidates) > 1
        memory = memory.probed(operator is setting.candidates[0] if tried else None)
        return direction, replace(memory, products=operator.products)

    # --- step length --------------------------------------------------------------------------------------------

    def _move(self, record: StepRecord, memory: Memory, direction: Direction) -> tuple[StepRecord, Memory]:
        optimizer = self._optimizer
        if not math.isfinite(direction.curvature) or not 0 < direction.norm < math.inf:
            return replace(record, outcome=StepOutcome.REJECTED), memory
        model = self._line(direction)
        trials = try_steps(
            optimizer._search,
            memory.search,
            model,
            lambda t: self._loss_at(direction, t),
            lambda t: self._slope_at(direction, t),
            optimizer._max_trials,
        )
        full = abs(trials.step_length - 1) <= 0.1 and abs(trials.rho - 1) <= 0.1
        memory = replace(
            memory,
            search=trials.state,
            damping=optimizer._damping.update(memory.damping, _realised(model, trials)),
            full_steps=memory.full_steps + 1 if trials.accepted and full else 0,
            progress=(model.loss - trials.loss) / max(abs(model.loss), torch.finfo(torch.float64).tiny),
        )
        return self._finish(record, model, direction, trials), memory

    def _escape(self, record: StepRecord, memory: Memory) -> tuple[StepRecord, Memory]:
        """At a stationary point: converged, unless there is a direction of negative curvature."""
        hessian = hessian_of(self.point, self._parameters)
        direction = escape_direction(hessian, self.point.gradient, seed=memory.steps)
        record = replace(record, products=hessian.products, cost=record.cost + Cost(hessian_products=hessian.products))
        if direction is None:
            self._keep = True
            return replace(record, outcome=StepOutcome.CONVERGED), memory
        record = replace(record, status=direction.status)
        model = self._line(direction)
        length = 1 + float(self._parameters.get().norm())
        trials = try_escape(memory.search, model, lambda t: self._loss_at(direction, t), length)
        return self._finish(record, model, direction, trials), replace(memory, full_steps=0)

    def _finish(self, record: StepRecord, model: LineModel, direction: Direction, trials: Trials) -> StepRecord:
        self._keep = trials.accepted
        if trials.accepted:  # the last trial need not be the best
            self._parameters.move(self._snapshot, direction.vector, trials.step_length)
        return replace(
            record,
            outcome=StepOutcome.ACCEPTED if trials.accepted else StepOutcome.REJECTED,
            new_loss=trials.loss,
            trials=trials.count,
            step_length=trials.step_length,
            direction_norm=direction.norm,
            slope=direction.slope,
            curvature=direction.curvature,
            predicted_decrease=model.decrease(trials.step_length),
            actual_decrease=model.decrease(trials.step_length) - trials.taylor_error,
            rho=trials.rho,
            taylor_error=trials.taylor_error,
            cost=record.cost + trials.cost,
        )

    def _line(self, direction: Direction) -> LineModel:
        loss = self.point.loss.detach()
        roundoff = torch.finfo(loss.dtype).eps / 2
        return LineModel(float(loss), direction.slope, direction.curvature, direction.norm, roundoff)

    def _loss_at(self, direction: Direction, step_length: float) -> float:
        self._parameters.move(self._snapshot, direction.vector, step_length)
        return float(self._frozen.loss())

    def _slope_at(self, direction: Direction, step_length: float) -> float:
        _, gradient = self._frozen.gradient()  # the parameters are at the trial already
        return float(gradient @ direction.vector)


def _realised(model: LineModel, trials: Trials) -> float:
    """The actual decrease over what the whole direction promised: small also where the step had to be shortened."""
    if not trials.accepted or model.curvature <= 0:
        return trials.rho
    return (model.loss - trials.loss) / model.decrease(model.minimizer)
