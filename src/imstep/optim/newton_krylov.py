"""The Newton-Krylov optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.choice import CurvatureChoice, GaussNewtonFirst
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Damping, LevenbergMarquardt, StepSearch, TaylorMonitor
from imstep.optim.attempt import Attempt, Strategies
from imstep.optim.forcing import BestRateForcing, Forcing
from imstep.optim.memory import Memory
from imstep.optim.preconditioning import Preconditioning
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.recycling import Recycling
from imstep.optim.solving import ConjugateGradient, Solver


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
        solver: how the system is solved: by default conjugate gradients.
        forcing: how accurately it is solved.
        step: how the step length is chosen.
        damping: how λ develops; its numbers are relative to the curvature along the first gradient.
        preconditioning: of the Krylov iteration.
        momentum: whether the direction is the model's minimiser over the solution and the last step together, for a
            product more.
        tolerance: ‖g‖ at which a point counts as stationary, >= 0; then negative curvature is looked for.
        max_trials: step lengths tried per step, >= 1.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.

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
        solver: Solver | None = None,
        forcing: Forcing | None = None,
        step: StepSearch | None = None,
        damping: Damping | None = None,
        preconditioning: Preconditioning | None = None,
        momentum: bool = False,
        tolerance: float = 1e-12,
        max_trials: int = 12,
        max_refusals: int = 5,
    ) -> None:
        if max_refusals < 1:
            raise ValueError(f"max_refusals is at least 1, got {max_refusals}.")
        self._strategies = Strategies(
            curvature=curvature or GaussNewtonFirst(),
            solver=solver or ConjugateGradient(),
            forcing=forcing or BestRateForcing(),
            step=step or TaylorMonitor(),
            damping=damping or LevenbergMarquardt(),
            momentum=momentum,
            tolerance=tolerance,
            max_trials=max_trials,
        )
        super().__init__(params, {})
        self._preconditioning = preconditioning or Recycling()
        self._parameters = _vector(self.param_groups)
        self._preconditioner = self._preconditioning.make(self._parameters)
        self._max_refusals = max_refusals
        self._memory = Memory(search=self._strategies.step.initial(), damping=self._strategies.damping.initial)
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
        frozen = FrozenClosure(closure, self._parameters)
        attempt = Attempt(self._strategies, self._memory, self._preconditioner, self._parameters, frozen)
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
