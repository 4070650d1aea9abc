"""The Newton-Krylov optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from imstep.curvature.choice import CurvatureChoice, GaussNewtonFirst
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Armijo, Damping, LevenbergMarquardt, StepSearch, TaylorMonitor
from imstep.optim.attempt import Attempt
from imstep.optim.forcing import BestRateForcing, FixedProducts, Forcing
from imstep.optim.memory import Memory
from imstep.optim.preconditioning import Kronecker, Preconditioning
from imstep.optim.preconditioning.recycling import Recycling
from imstep.optim.solving import BlendedConjugateGradient, ConjugateGradient, Solver
from imstep.optim.stepwise import StepwiseOptimizer
from imstep.optim.strategies import Strategies

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NewtonKrylovOptions(TypedDict, total=False):
    """The keyword arguments of :class:`NewtonKrylov`, for functions that pass them on."""

    curvature: CurvatureChoice | None
    solver: Solver | None
    forcing: Forcing | None
    step: StepSearch | None
    damping: Damping | None
    preconditioning: Preconditioning | None
    momentum: bool
    tolerance: float
    max_trials: int
    max_refusals: int
    variance_every: int


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
        variance_every: steps between two measurements of the gradient's variance, for :class:`GrowingBatches`, >= 1; 0
            for none. Each is a backward pass.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first, which its type leaves out.
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
        variance_every: int = 0,
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
            variance_every=variance_every,
        )
        memory = Memory(search=self._strategies.step.initial(), damping=self._strategies.damping.initial)
        super().__init__(params, memory, max_refusals)
        self._preconditioning = preconditioning or Recycling()
        self._preconditioner = self._preconditioning.make(self._parameters)

    @classmethod
    def for_batches(cls, params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
        """The configuration for mini-batches: short solves that do not fit the batch.

        The matrix is a blend of the batch's curvature and of Kronecker factors averaged over many batches; the solves
        take two products, λ has a floor, and backtracking leaves the full step as it is unless the loss rises.
        Evaluate an average of the iterates, such as the one
        ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))``.

        Args:
            params: parameters or parameter groups.
            **options: any of the constructor's, in place of this configuration's.

        Raises:
            TypeError: an option that the constructor does not have.

        Source: our choice by measurement, ``benchmarks/minibatch``.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.zeros(3))
            >>> optimizer = NewtonKrylov.for_batches([w])
            >>> for batch in torch.arange(120.0).reshape(40, 3):
            ...     loss = optimizer.step(lambda: (w - batch.remainder(3)).square().mean())
            >>> w.detach().round()
            tensor([0., 1., 2.])
        """
        configuration: NewtonKrylovOptions = {
            "solver": BlendedConjugateGradient(),
            "forcing": FixedProducts(2),
            "step": Armijo(),
            "damping": LevenbergMarquardt(initial=0.1, floor=1e-3),
            "preconditioning": Kronecker(every=10),
        }
        configuration.update(options)
        return cls(params, **configuration)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, curvature_closure: Callable[[], Any] | None = None
    ) -> Tensor:
        """Take one step.

        Args:
            closure: see :meth:`StepwiseOptimizer.step`. It is evaluated several times.
            curvature_closure: returns the loss on a part of the batch, from which the curvature is taken; None for the
                whole batch. Products then cost in proportion, and a plain gradient of the batch comes on top.

        Returns:
            What the closure returned before the step, if that is a number, else the loss; 0-dim, detached. ``.grad`` of
            the parameters is the loss's gradient there.

        Raises:
            TypeError: no closure.
            ValueError: a closure returned no scalar with a graph, or one that no parameter influences.
            NonFiniteLossError: too many steps in a row met a loss or gradient that is not finite.
        """
        frozen = self._frozen(closure)
        part = None if curvature_closure is None else self._frozen(curvature_closure)
        return self._take(self._attempt(frozen, part))

    def _attempt(self, frozen: FrozenClosure, part: FrozenClosure | None = None) -> Attempt:
        return Attempt(self._strategies, self._memory, self._preconditioner, self._parameters, frozen, part)

    def _parts(self) -> dict[str, Any]:
        return {"preconditioner": self._preconditioner.state_dict()}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._preconditioner.load_state_dict(parts["preconditioner"])

    def _adopt(self, parameters: ParameterVector) -> None:
        super()._adopt(parameters)
        self._preconditioner = self._preconditioning.make(parameters)  # it starts afresh
