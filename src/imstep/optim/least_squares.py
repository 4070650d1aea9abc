"""The Levenberg-Marquardt method in residual space."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes
from imstep.curvature.shared import SharedBatch
from imstep.globalization import ContractionDamping, SearchState
from imstep.linalg import ByShape, Factorisation
from imstep.optim.averaging import Averaging
from imstep.optim.balancing import Balancing
from imstep.optim.box import Box, BoxedParameters
from imstep.optim.checking import Check
from imstep.optim.closure_needed import needs_closure
from imstep.optim.memory import Memory
from imstep.optim.micro_batches import MicroBatches
from imstep.optim.recall import EarlierDraws
from imstep.optim.record import Cost
from imstep.optim.residual_attempt import ResidualAttempt
from imstep.optim.residual_settings import Settings
from imstep.optim.scaling import Scaling, Unscaled
from imstep.optim.sharing import shared_loss
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.stepwise import StepwiseOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LeastSquares(StepwiseOptimizer):
    """Levenberg-Marquardt steps in residual space, for losses that are sums of squares: physics-informed networks.

    One step reads the Jacobian J of the residuals ρ off autograd's graph, factorises JJᵀ by as few columns as λ allows,
    and moves by accelerated chord iterations, which keep J and only evaluate ρ, towards

        min over d of ‖ρ(w + d)‖² + λ‖d‖²

    λ follows from how fast their corrections shrink; other λ are tried without a new factorisation. There is no
    learning rate to set, and the loss never rises (with ``balance`` that with weights).

    Data, random numbers and buffers are the same for all evaluations of one step. A step that cannot be accepted leaves
    parameters and buffers bit for bit as they were.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone. Groups may have an
            ``lr`` and a ``weight_decay`` of their own.
        lr: how much of the step is taken, >= 0, for schedules; see docs/optimizer.md.
        weight_decay: λ >= 0 of a penalty ½λ‖w‖² that is added to the loss, as if √λ w were residuals.
        max_step_norm: the longest step ‖w_new - w‖, > 0; None for no bound. λ is raised until steps keep it.
        damping: how λ develops; its ``initial`` is relative to the curvature along the first gradient.
        factorisation: default :class:`~imstep.linalg.ByShape`, the cheapest way for the shape of J and λ, which
            ``last_step`` tells: few columns of JJᵀ, as by :class:`~imstep.linalg.PivotedCholesky`, few rows of J, by
            :class:`~imstep.linalg.PivotedQR`, or else all of JJᵀ, by :class:`~imstep.linalg.DenseFactorisation`, or of
            J, by :class:`~imstep.linalg.ThinFactorisation`; few columns as a preconditioner, by
            :class:`~imstep.linalg.SketchedFactorisation`. Also :class:`~imstep.linalg.RandomizedNystrom`.
        scaling: the D of a damping λ‖D d‖²: :class:`Unscaled`, D = 1, or :class:`ColumnNorms`, with which steps do not
            depend on the parameters' units, and for which J is written out.
        box: bounds on the parameters, as one vector; None for none. J is written out.
        corrections: chord iterations per trial, >= 1; unless parameters are scaled, up to 12 where the loss has not
            fallen by 0.7 of what the first, linear one has promised; 1 for plain Levenberg-Marquardt steps.
        share: trace of what the factorisation leaves out of JJᵀ, as a fraction of λ, >= 0.
        momentum: μ, in [0, 1): the step is damped towards μ times the last one, min ‖ρ(w + d)‖² + λ‖d - μ d'‖², for an
            evaluation more; for residuals drawn anew each step. A trial that fails is repeated without.
        recall: :class:`EarlierDraws`, for points drawn anew each step: a step changes little at the points of those
            before it, without evaluating anything there; J is written out. None for steps that know only their own.
        balance: :class:`EqualTraces` or :class:`EqualGradients`, for losses of several terms, such as an equation and
            boundary values: each step lowers a sum with weights chosen so that none is left behind. They take the
            place of factors that the closure gives, are kept for a step, and told in ``last_step.weights``. What
            :meth:`step` returns, ``.grad`` and checks are without them. None for the sum as it is.
        tolerance: ‖g‖ at which a point counts as stationary, >= 0; where no gradient has been as large as 1, as a
            fraction of the largest.
        max_trials: values of λ tried per step, >= 1.
        average: of the iterates, such as :class:`ExponentialAverage`, evaluated in :meth:`averaged`; None for none.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.
        process_group: of ``torch.distributed``, whose processes each have a part of the residuals, or none: the loss is
            as for :class:`~imstep.NewtonKrylov`, and steps are those of one process on all of them. None for one
            process. See docs/tutorial-processes.md.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first. Its ``iterations`` are the
            corrections of the step, its ``trials`` all evaluations of residuals, and its ``status`` is None.
        cost: everything spent so far.

    Raises:
        ValueError, TypeError: see :class:`~imstep.curvature.ParameterVector`; a number is out of range.
        NoResidualsError: at a step: the loss is no sum of squares, or its residuals depend on each other.

    Cost: a step on N residuals takes a forward and one to three backward passes (three to five at first), p columns of
        JJᵀ, about N p² operations, and a forward pass per correction, for which the closure is called or, where its
        operators are known to do, run again without it; p is a few times the number of eigenvalues of JJᵀ
        above λ. Where that is more than a third of N or half of the n parameters, or λ is near the rounding of JJᵀ, k
        rows of J, 2 N n k to 4 N n k operations, and 4 k³/3 for each λ; where they are too many, with N < n all of
        JJᵀ, and N³/3 operations for each λ, else QR factors of J, 2 N n² operations, and 4 n³/3 for each λ.

    Source: our own, from Levenberg-Marquardt in residual space as for neural quantum states (Chen and Heyl,
        arXiv 2302.01941) and physics-informed networks (Müller and Zeinhofer, arXiv 2302.13163); geodesic acceleration
        (Transtrum and Sethna, arXiv 1201.5885); momentum as in SPRING (Goldshlager, Abrahamsen and Lin,
        arXiv 2401.10190).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(0, 1, 20)[:, None]
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> optimizer = LeastSquares(model.parameters())
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), (6 * x).sin()))
        >>> bool(loss < 1e-6)
        True
    """

    _key = "least_squares"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        max_step_norm: float | None = None,
        damping: ContractionDamping | None = None,
        factorisation: Factorisation | None = None,
        scaling: Scaling | None = None,
        box: Box | None = None,
        corrections: int = 4,
        share: float = 1.0,
        momentum: float = 0.0,
        recall: EarlierDraws | None = None,
        balance: Balancing | None = None,
        tolerance: float = 1e-12,
        max_trials: int = 30,
        max_refusals: int = 5,
        average: Averaging | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._processes = Processes.of(process_group)
        if balance is not None and self._processes is not None:
            raise ValueError(
                "balance weights the terms of one process's loss, and those of several are not matched up. Leave "
                "balance out, or write the factors into the loss."
            )
        self._settings = Settings(
            damping or ContractionDamping(),
            factorisation or ByShape(),
            scaling or Unscaled(),
            corrections,
            share,
            momentum,
            recall,
            balance,
            tolerance,
            max_trials,
        )
        self._box = box
        memory = Memory(search=SearchState(), damping=self._settings.damping.initial)
        options = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            params,
            memory,
            options=options,
            max_step_norm=max_step_norm,
            max_refusals=max_refusals,
            average=average,
        )
        self._owners = KnownOwners()

    @needs_closure
    def step(self, closure: Callable[[], Any], check: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take one step, and see whether it holds at other points.

        Args:
            closure: returns the loss, a tensor with one entry, or calls ``backward()`` on it; evaluated several times.
                See docs/closures.md. For a batch in pieces a :class:`MicroBatches`, or a list of closures, which
                return their losses and call no ``backward()``.
            check: returns the same loss at other points, as a tensor with one entry or a number; the same points in all
                steps, or new ones. It is evaluated without a gradient, where the step ends, and where the first one
                begins; it changes nothing in steps. ``last_step`` has the losses, ``check_loss`` before the step and
                ``new_check_loss`` after it, and ``generalisation``, how much of the step's gain is found there. Where
                the loss at the steps' points falls to a quarter, while for five steps that of ``check`` does not fall
                and is more than twice as large, an :class:`OverfittingWarning` is given, once.

        Where points are drawn anew, the loss before a step shows how the last one holds elsewhere. Where ten steps in a
        row end a hundred times below it, and it does not fall to a tenth, the same warning is given, once: the points
        are too few.

        Returns:
            What the closure returned before the step, if that is a number, else the loss; 0-dim, detached. ``.grad`` of
            the parameters is the loss's gradient there.

        Raises:
            TypeError: no closure; ``check`` is no function.
            ValueError: the closure gave no scalar with a graph, or one that no parameter influences, or does what has
                no meaning here, such as clipping gradients.
            NonFiniteLossError: too many steps in a row met a loss or gradient that is not finite.
        """
        if self._settings.balance is not None and MicroBatches.of(closure) is not None:
            raise ValueError(
                "balance weights the terms of one loss, and in a batch in pieces each piece has terms of its own. Take "
                "all in one closure, or leave balance out."
            )
        with self._together():
            return self._step(closure) if check is None else self._step_and_check(closure, check)

    def _step(self, closure: Callable[[], Any]) -> Tensor:
        last = self._memory.loss
        returned = self._take(self._attempt(self._batch(closure)))
        loss, eps = self.last_step.loss, torch.finfo(self._parameters.dtype).eps
        draws = self._memory.draws.meet(loss, last).warn(loss, self._parameters.size, eps)
        self._memory = replace(self._memory, draws=draws)
        return returned

    def _step_and_check(self, closure: Callable[[], Any], check: Callable[[], Any]) -> Tensor:
        elsewhere = self._elsewhere(check)
        before, first = self._checked(elsewhere)
        returned = self._step(closure)
        started = time.perf_counter()
        loss = self.last_step.loss - self.last_step.penalty
        before = math.nan if self.last_step.went_back else before  # of another point
        self._memory = replace(self._memory, checks=self._memory.checks.meet(loss, before).warn(loss))
        after, second = self._checked(elsewhere)
        spent = Cost(losses=first + second)
        self.cost = self.cost + spent
        record = replace(self.last_step, check_loss=before, new_check_loss=after, cost=self.last_step.cost + spent)
        self.last_step = replace(record, seconds=record.seconds + time.perf_counter() - started)
        return returned

    def _elsewhere(self, check: Any) -> Callable[[], float]:
        """The loss of ``check``, that of all processes; or refuse, before anything is evaluated."""
        processes = self._processes
        if processes is None:
            self._where()
            return Check(check, self._parameters).loss

        def own() -> float:
            self._where()
            return Check(check, self._parameters).loss()

        return lambda: shared_loss(processes, check, own)

    def _checked(self, elsewhere: Callable[[], float]) -> tuple[float, bool]:
        """The loss elsewhere where the parameters are, and whether it had to be evaluated."""
        checks, size = self._memory.checks, self._parameters.norm()
        if size == checks.size:
            return checks.last, False
        loss = elsewhere()
        self._memory = replace(self._memory, checks=replace(checks, last=loss, size=size))
        return loss, True

    def _attempt(self, frozen: FrozenClosure | SharedBatch) -> StepAttempt:
        if self._box is not None and frozen.penalty is not None:
            raise ValueError(
                "LeastSquares takes weight_decay or a box, not both: steps within bounds are found another way. Write "
                "the penalty into the loss, as in loss + weight_decay / 2 * w.square().sum(), which makes residuals."
            )
        where = self._memory, self._parameters, frozen
        return ResidualAttempt(self._settings, *where, self._owners, self._box, self._pace())

    def _vector(self) -> ParameterVector:
        vector = super()._vector()
        if vector.evaluated is not vector:
            raise ValueError(
                "LeastSquares works on whole parameters in every process, and a parameter is sharded (fully_shard, "
                "DTensor). Leave fully_shard out and pass process_group= all the same: each process then has its part "
                "of the residuals; or take NewtonKrylov, which steps on shards."
            )
        return vector if self._box is None else BoxedParameters(vector.tensors, self._box, self._processes)

    def _chosen(self) -> dict[str, Any]:
        names = ("damping", "factorisation", "scaling", "recall", "balance")
        chosen = {name: getattr(self._settings, name) for name in names}
        return {name: strategy for name, strategy in chosen.items() if strategy is not None}

    def _parts(self) -> dict[str, Any]:
        return {"owners": self._owners.state_dict()}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._owners.load_state_dict(parts["owners"])
