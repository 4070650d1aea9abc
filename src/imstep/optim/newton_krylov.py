"""The Newton-Krylov optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from imstep.curvature.choice import CurvatureChoice, GaussNewtonFirst
from imstep.curvature.fully_sharded import is_sharded
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch, FrozenPieces
from imstep.curvature.processes import Processes
from imstep.globalization import Damping, LevenbergMarquardt, StepSearch, TaylorMonitor
from imstep.optim.attempt import Attempt
from imstep.optim.averaging import Averaging
from imstep.optim.between import EnrichedAttempt, QuasiNewtonSteps
from imstep.optim.closure_needed import needs_closure
from imstep.optim.forcing import BestRateForcing, FixedProducts, Forcing
from imstep.optim.memory import Memory
from imstep.optim.micro_batches import MicroBatches
from imstep.optim.preconditioning import Kronecker, LimitedMemoryBFGS, Preconditioning
from imstep.optim.preconditioning.quasi_newton import LimitedSecants
from imstep.optim.preconditioning.recycling import Recycling
from imstep.optim.record import Cost
from imstep.optim.solving import BlendedConjugateGradient, ConjugateGradient, Solver
from imstep.optim.stepwise import StepwiseOptimizer
from imstep.optim.strategies import Strategies
from imstep.optim.variance_reduction import VarianceReduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class NewtonKrylovOptions(TypedDict, total=False):
    """The keyword arguments of :class:`NewtonKrylov`, for functions that pass them on."""

    lr: float | Tensor
    weight_decay: float
    max_step_norm: float | None
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
    average: Averaging | None
    variance_every: int
    variance_reduction: VarianceReduction | None
    between: QuasiNewtonSteps | None
    process_group: ProcessGroup | None


BETWEEN = QuasiNewtonSteps()
"""The default."""


class NewtonKrylov(StepwiseOptimizer):
    """Newton's method with Krylov solves, safeguarded by monitoring the Taylor error; no step size to set.

    One step evaluates the closure's loss and gradient and records the gradient's derivative; solves the damped Newton
    system by conjugate gradients, ended by the first disturbing direction or when further products do not
    pay; and moves along the solution as far as the quadratic model proves right:

        (A + λI) d = -g,   w <- w + t d,   t from ``step`` by the measured error E(t) = f(w + t d) - m(t)

    Data, random numbers and buffers are the same for all evaluations of one step. A step that cannot be
    accepted leaves parameters and buffers bit for bit as they were.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone. Groups may have an
            ``lr`` and a ``weight_decay`` of their own.
        lr: how much of the step is taken, >= 0; see docs/optimizer.md. 1 is Newton's step, and no tuning improves on it
            near a minimum, where less makes convergence linear, by 1 - lr a step. For schedules.
        weight_decay: λ >= 0 of a penalty ½λ‖w‖² that is added to the loss, and so to gradient, curvature and trials.
        max_step_norm: the longest step ‖w_new - w‖, > 0; None for no bound. It takes the place of gradient clipping.
        curvature: which matrix A is: by default Gauss-Newton where the loss is a convex function of the
            model's outputs, else the Hessian; ``ExactHessian()`` for the Hessian always.
        solver: how the system is solved: by default conjugate gradients.
        forcing: how accurately it is solved.
        step: how the step length is chosen.
        damping: how λ develops; its numbers are relative to the curvature along the first gradient.
        preconditioning: of the Krylov iteration.
        momentum: whether the direction is the model's minimiser over the solution and the last step together, for a
            product more.
        tolerance: ‖g‖ at which a point counts as stationary, >= 0; where no gradient has been as large as 1, as a
            fraction of the largest. Then negative curvature is looked for.
        max_trials: step lengths tried per step, >= 1.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.
        average: of the iterates, such as :class:`ExponentialAverage`, evaluated in :meth:`averaged`; None for none.
        variance_every: steps between two measurements of the gradient's variance, for :class:`GrowingBatches`, >= 1; 0
            for none. Each is a backward pass.
        variance_reduction: of the batches' gradients, by a snapshot and all data, as in SVRG; None for none.
        between: quasi-Newton steps between Newton steps where these hold nearby only, in one process and on a loss that
            stays the same from step to step; by default with the default curvature and solver and without a process
            group; None for none.
        process_group: of ``torch.distributed``, whose processes hold the same parameters and evaluate each a part of
            the batch: a step is then the step on all parts together. All take the same steps, and each passes its own
            part: a plain closure counts the same in every process, as in ``DistributedDataParallel``; a
            :class:`MicroBatches` counts by its examples, and may be empty. Parameters may be sharded over the
            processes by ``torch.distributed.fsdp.fully_shard``; vectors are then, too. None for one process; note that
            ``torch.distributed.group.WORLD`` is None before ``init_process_group``.

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
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        max_step_norm: float | None = None,
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
        average: Averaging | None = None,
        variance_every: int = 0,
        variance_reduction: VarianceReduction | None = None,
        between: QuasiNewtonSteps | None = BETWEEN,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._processes = Processes.of(process_group)
        if variance_reduction is not None and self._processes is not None:
            raise ValueError(
                "variance_reduction is for one process: it would take gradients that other processes do not know of. "
                "Leave process_group or variance_reduction out."
            )
        if between is BETWEEN and not (process_group is curvature is solver is None):
            between = None
        if between is not None and self._processes is not None:
            raise ValueError("between is for one process. Leave process_group or between out.")
        self._reduction = variance_reduction
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
        options = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            params,
            memory,
            options=options,
            max_step_norm=max_step_norm,
            max_refusals=max_refusals,
            average=average,
        )
        if process_group is not None and self._processes is None and any(map(is_sharded, self._parameters.tensors)):
            self._processes = Processes(process_group)  # one, under fully_shard
            self._parameters = self._vector()
        self._preconditioning = preconditioning or Recycling()
        self._preconditioner = self._preconditioning.make(self._parameters)
        self._between, self._secants = between, _secants(between, self._parameters)
        if variance_reduction is not None:
            variance_reduction.follow(self._parameters)

    @classmethod
    def for_batches(cls, params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
        """The configuration for mini-batches: short solves that do not fit the batch.

        The matrix is a blend of the batch's curvature and of Kronecker factors averaged over many batches; the solves
        take two products, λ has a floor, and the Taylor monitor bounds the step.
        With ``average=ExponentialAverage()``, and evaluated in :meth:`averaged`, it is mostly a little better still.

        Args:
            params: parameters or parameter groups.
            **options: any of the constructor's, in place of this configuration's.

        Raises:
            TypeError: an option that the constructor does not have.

        Source: our choice by measurement, ``benchmarks/minibatch`` and ``benchmarks/small_problems``.

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
            "solver": BlendedConjugateGradient(weight=0.1),
            "forcing": FixedProducts(2),
            "damping": LevenbergMarquardt(floor=1e-4),
            "preconditioning": Kronecker(every=10),
        }
        configuration.update(options)
        return cls(params, **configuration)

    @needs_closure
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any], curvature_closure: Callable[[], Any] | None = None
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
            OtherProcessError: the closure failed in another process; in that one it raises what it raised.
            ProcessesLostError: another process has ended, or is not at the same place.
        """
        with self._together():
            closure, spent = self._reduced(closure)
            frozen = self._batch(closure)
            part = None if curvature_closure is None else self._batch(curvature_closure)
            return self._take(self._attempt(frozen, part), spent)

    def _reduced(self, closure: Callable[[], Any]) -> tuple[Callable[[], Any], Cost]:
        """The closure, with the term that takes variance from its gradient if one is asked for, and what that took."""
        if self._reduction is None:
            return closure, Cost()
        self._follow_parameters()
        before = self._reduction.gradients
        reduced = self._reduction(closure)
        return reduced, Cost(gradients=self._reduction.gradients - before)

    def _batch(self, closure: Any) -> FrozenBatch:
        """The closure on its batch: whole, in pieces, or with those of other processes."""
        if self._processes is not None:
            return self._shared(closure, whole=False)
        pieces = MicroBatches.of(closure)
        if pieces is None:
            return self._frozen(closure)
        return FrozenPieces(pieces.checked().pieces, *self._where(), pieces.memory_budget)

    def _attempt(self, frozen: FrozenBatch, part: FrozenBatch | None = None) -> Attempt:
        whole = self._strategies, self._memory, self._preconditioner, self._parameters, frozen, part, self._pace()
        if self._between is None or self._secants is None:
            return Attempt(*whole)
        return EnrichedAttempt(self._between, self._secants, *whole)

    def _chosen(self) -> dict[str, Any]:
        names = ("curvature", "solver", "forcing", "step", "damping")
        chosen = {name: getattr(self._strategies, name) for name in names}
        chosen["preconditioning"] = self._preconditioning
        return chosen if self._between is None else {**chosen, "between": self._between}

    def _parts(self) -> dict[str, Any]:
        parts = {"preconditioner": self._preconditioner.state_dict()}
        if self._secants is not None:
            parts["secants"] = self._secants.state_dict()
        if self._reduction is not None:
            parts["variance_reduction"] = self._reduction.state_dict()
        return parts

    def _load_entry(self, entry: dict[str, Any]) -> None:
        if (none := _secants(self._between, self._parameters)) is not None:  # a state of several processes has none
            entry = {"secants": none.state_dict(), **entry}
        super()._load_entry(entry)

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._preconditioner.load_state_dict(parts["preconditioner"])
        if self._secants is not None:
            self._secants.load_state_dict(parts["secants"])
        if self._reduction is not None:
            self._reduction.load_state_dict(parts["variance_reduction"])

    def _adopt(self, parameters: ParameterVector) -> None:
        super()._adopt(parameters)
        self._preconditioner = self._preconditioning.make(parameters)  # it starts afresh
        self._secants = _secants(self._between, parameters)
        if self._reduction is not None:
            self._reduction.follow(parameters)


def _secants(between: QuasiNewtonSteps | None, parameters: ParameterVector) -> LimitedSecants | None:
    """What quasi-Newton steps are made of; None where there are none."""
    return None if between is None else LimitedMemoryBFGS(between.pairs).make(parameters)
