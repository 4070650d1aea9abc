"""An optimizer for methods with a diagonal of curvature and a fixed rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.shared import SharedBatch
from imstep.optim.averaging import Averaging
from imstep.optim.diagonal_rules import DiagonalRule
from imstep.optim.fixed_rate import FixedRateAttempt, FixedRateOptimizer
from imstep.optim.memory import Memory
from imstep.optim.pace import Pace
from imstep.optim.record import Cost, StepRecord
from imstep.optim.step_attempt import StepAttempt

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DiagonalNewton(FixedRateOptimizer):
    """Momentum divided by a diagonal of curvature, entry by entry, with a fixed rate: AdaHessian and Sophia.

    A step evaluates one gradient, moves, and asks nothing of the loss where it ends: unlike
    :class:`~imstep.NewtonKrylov` it takes steps uphill, and ``last_step.new_loss`` is nan.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone. Groups may have an
            ``lr`` and a ``weight_decay`` of their own.
        rule: the method, such as :class:`SophiaG`.
        lr: >= 0; for schedules, too.
        weight_decay: λ >= 0; w <- (1 - lr λ) w before a step, apart from loss and curvature.
        max_step_norm: the longest step, > 0; None for no bound.
        seed: of the probes; they do not touch the global random state.
        max_refusals: see :class:`~imstep.NewtonKrylov`.
        average, process_group: see :class:`~imstep.NewtonKrylov`; parameters are not sharded.

    Raises:
        ValueError, TypeError: as of :class:`~imstep.NewtonKrylov`.

    Cost: a gradient; where an estimate is due 4/3, and a Hessian product or a backward pass.

    Example:
        >>> import torch
        >>> from imstep.optim import AdaHessianRule
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = DiagonalNewton([w], AdaHessianRule(), lr=0.15)
        >>> for _ in range(200):
        ...     loss = optimizer.step(lambda: w[0] ** 2 + 100 * w[1] ** 2)
        >>> bool(loss < 1e-6)
        True
    """

    _key = "diagonal_newton"

    def __init__(
        self,
        params: Iterable[Any],
        rule: DiagonalRule,
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        max_step_norm: float | None = None,
        seed: int = 0,
        max_refusals: int = 5,
        average: Averaging | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(rule, DiagonalRule):
            raise TypeError(f"rule must be a DiagonalRule, got {rule!r}. Pass AdaHessianRule() or SophiaG().")
        self._rule, self._seed = rule, seed
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
        return _Means(parameters, self._seed)

    def _attempt(self, frozen: FrozenClosure | SharedBatch) -> StepAttempt:
        made = self._rule, self._means, self._decay()
        return _DiagonalAttempt(*made, self._memory, self._parameters, frozen, self._pace())

    def _chosen(self) -> dict[str, Any]:
        return {"rule": self._rule}


class _Means:
    """The running means m of gradients and h of curvature, with how many each is of."""

    def __init__(self, parameters: ParameterVector, seed: int) -> None:
        self.momentum = parameters.get().zero_()
        self.curvature = self.momentum.clone()
        self.steps = self.estimates = 0
        self.generator = torch.Generator(device=parameters.device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.momentum, self.curvature = state["momentum"], state["curvature"]
        self.steps, self.estimates = state["steps"], state["estimates"]


class _DiagonalAttempt(FixedRateAttempt):
    """A step of a diagonal rule."""

    def __init__(
        self,
        rule: DiagonalRule,
        means: _Means,
        decay: Tensor,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure | SharedBatch,
        pace: Pace,
    ) -> None:
        super().__init__(memory, parameters, frozen, pace)
        self._rule, self._means, self._decay = rule, means, decay

    def run(self) -> tuple[StepRecord, Memory]:
        rule, means, memory = self._rule, self._means, self._memory
        point = None
        if means.steps % rule.every == 0:
            point = self._frozen.linearise(keep_graph=rule.needs_graph)
            self._at = point.loss.detach(), point.gradient
            record = self._opened(Cost(linearisations=1))
        else:
            self._at = self._frozen.watched_gradient()
            record = self._opened(Cost(gradients=1))
        if not record.finite:
            return self._not_finite(record)
        if point is not None:
            sample, spent = rule.estimate(point, self._parameters, means.generator)
            means.curvature = rule.beta2 * means.curvature + (1 - rule.beta2) * sample
            means.estimates += 1
            record = replace(record, products=spent.products, cost=record.cost + spent)
        means.momentum = rule.beta1 * means.momentum + (1 - rule.beta1) * self._at[1]
        means.steps += 1
        step = rule.step(means.momentum, means.curvature, means.steps, means.estimates)
        return self._moved(record, self._decay.to(step) * self.origin + step), memory.meet(record.gradient_norm)
