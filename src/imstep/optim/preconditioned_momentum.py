"""An optimizer for preconditioners of gradients with a fixed rate: Shampoo, SOAP and KL-Shampoo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.shared import SharedBatch
from imstep.optim.averaging import Averaging
from imstep.optim.fixed_rate import FixedRateAttempt, FixedRateOptimizer
from imstep.optim.memory import Memory
from imstep.optim.pace import Pace
from imstep.optim.preconditioning.gradient_factors import GradientFactors, GradientPreconditioner
from imstep.optim.record import Cost, StepRecord
from imstep.optim.step_attempt import StepAttempt

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PreconditionedMomentum(FixedRateOptimizer):
    """A running mean of gradients, preconditioned, with a fixed rate: first-order Shampoo, SOAP and KL-Shampoo.

        m <- β m + (1 - β) g,   w <- w - lr (P m / (1 - βᵗ) + λ w)

    A step evaluates one gradient, moves, and asks nothing of the loss where it ends: unlike
    :class:`~imstep.NewtonKrylov` it takes steps uphill, and ``last_step.new_loss`` is nan.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone. Groups may have an
            ``lr`` and a ``weight_decay`` of their own.
        preconditioning: P, such as :class:`SOAP`.
        lr: >= 0; for schedules, too.
        momentum: β, in [0, 1).
        weight_decay: λ >= 0, apart from the loss.
        max_step_norm, max_refusals, average, process_group: see :class:`~imstep.NewtonKrylov`; parameters are not
            sharded.

    Raises:
        ValueError, TypeError: as of :class:`~imstep.NewtonKrylov`.

    Cost: a gradient, and for a matrix of m rows and n columns 2 mn(m + n) multiplications; now and then decompositions.

    Example:
        >>> import torch
        >>> from imstep.optim import SOAP
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = PreconditionedMomentum([w], SOAP(), lr=0.05)
        >>> for _ in range(200):
        ...     loss = optimizer.step(lambda: (torch.tensor([[1.0, 10.0], [0.1, 1.0]]) * w).square().sum())
        >>> bool(loss < 1e-3)
        True
    """

    _key = "preconditioned_momentum"

    def __init__(
        self,
        params: Iterable[Any],
        preconditioning: GradientFactors,
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_step_norm: float | None = None,
        max_refusals: int = 5,
        average: Averaging | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(preconditioning, GradientFactors):
            raise TypeError(
                f"preconditioning must learn from gradients alone, got {preconditioning!r}. Pass Shampoo(), SOAP() or "
                "KLShampoo(); others are for NewtonKrylov."
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum, the weight of the past gradients, must lie in [0, 1), got {momentum}.")
        self._preconditioning, self._beta = preconditioning, momentum
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            max_step_norm=max_step_norm,
            max_refusals=max_refusals,
            average=average,
            process_group=process_group,
        )

    def _begun(self, parameters: ParameterVector) -> _Means:
        return _Means(parameters, self._preconditioning)

    def _attempt(self, frozen: FrozenClosure | SharedBatch) -> StepAttempt:
        made = self._means, self._beta, self._decay()
        return _Attempt(*made, self._memory, self._parameters, frozen, self._pace())

    def _chosen(self) -> dict[str, Any]:
        return {"preconditioning": self._preconditioning}


class _Means:
    """The running mean of gradients, how many it is of, and the preconditioner."""

    def __init__(self, parameters: ParameterVector, kind: GradientFactors) -> None:
        self.gradient, self.steps = parameters.get().zero_(), 0
        self.preconditioner: GradientPreconditioner = kind.make(parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"gradient": self.gradient, "steps": self.steps, "preconditioner": self.preconditioner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.preconditioner.load_state_dict(state["preconditioner"])
        self.gradient, self.steps = state["gradient"], state["steps"]


class _Attempt(FixedRateAttempt):
    """A step of a preconditioned mean."""

    def __init__(
        self,
        means: _Means,
        beta: float,
        decay: Tensor,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure | SharedBatch,
        pace: Pace,
    ) -> None:
        super().__init__(memory, parameters, frozen, pace)
        self._means, self._beta, self._decay = means, beta, decay

    def run(self) -> tuple[StepRecord, Memory]:
        memory, means = self._memory, self._means
        self._at = self._frozen.watched_gradient()
        record = self._opened(Cost(gradients=1))
        if not record.finite:
            return self._not_finite(record)
        gradient = self._at[1]
        means.preconditioner.take(gradient)
        means.gradient = self._beta * means.gradient + (1 - self._beta) * gradient
        means.steps += 1
        inverse = means.preconditioner.operator(0.0)
        step = means.gradient / (1 - self._beta**means.steps)
        step = step if inverse is None else inverse @ step
        return self._moved(record, self._decay.to(step) * self.origin + step), memory.meet(record.gradient_norm)
