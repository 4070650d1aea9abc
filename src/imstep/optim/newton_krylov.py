"""The Newton-Krylov optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from imstep.curvature.choice import CurvatureChoice, GaussNewtonFirst
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Damping, LevenbergMarquardt, StepSearch, TaylorMonitor
from imstep.optim.attempt import Attempt, Strategies
from imstep.optim.forcing import BestRateForcing, Forcing
from imstep.optim.memory import Memory
from imstep.optim.preconditioning import Preconditioning
from imstep.optim.recycling import Recycling
from imstep.optim.solving import ConjugateGradient, Solver
from imstep.optim.stepwise import StepwiseOptimizer


class NewtonKrylov(StepwiseOptimizer):
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
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> optimizer = NewtonKrylov([w])
        >>> rosenbrock = lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2
        >>> for _ in range(40):
        ...     loss = optimizer.step(rosenbrock)
        >>> bool(rosenbrock() < 1e-12)
        True
    """

    _key = "newton_krylov"

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
        memory = Memory(search=self._strategies.step.initial(), damping=self._strategies.damping.initial)
        super().__init__(params, memory, max_refusals)
        self._preconditioning = preconditioning or Recycling()
        self._preconditioner = self._preconditioning.make(self._parameters)

    def _attempt(self, frozen: FrozenClosure) -> Attempt:
        return Attempt(self._strategies, self._memory, self._preconditioner, self._parameters, frozen)

    def _parts(self) -> dict[str, Any]:
        return {"preconditioner": self._preconditioner.state_dict()}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._preconditioner.load_state_dict(parts["preconditioner"])

    def _adopt(self, parameters: ParameterVector) -> None:
        super()._adopt(parameters)
        self._preconditioner = self._preconditioning.make(parameters)  # it starts afresh
