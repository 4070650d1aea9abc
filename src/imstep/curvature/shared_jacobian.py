"""The Jacobian of the residuals of several processes, each of which evaluates its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.gradient_rows import Form
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import JacobianRows, ResidualJacobian
from imstep.curvature.shared import SharedBatch, refuse_hooks
from imstep.curvature.shared_rows import SharedRows, Stack


@dataclass(frozen=True)
class _Facts:
    """What a process tells the others of its residuals.

    Attributes:
        count: of them.
        dtype: of its loss; None where it evaluates nothing.
        used, forms: by parameter, whether the residuals depend on it, and how its rows are sent.
        evaluations, passes: made here.
        smooth: whether finite residuals have finite derivatives.
        hooked: whether a hook changes gradients.
        eps: rounding of its residuals.
        returned: its share of what closures returned; None where that is no number.
    """

    count: int = 0
    dtype: torch.dtype | None = None
    used: Sequence[bool] = ()
    forms: Sequence[Form | None] = ()
    evaluations: int = 0
    passes: int = 0
    smooth: bool = True
    hooked: bool = False
    eps: float = 0.0
    returned: float | None = 0.0


class SharedJacobian(SharedRows):
    """J = ∂ρ/∂w of the residuals ρ of a loss f = Σ w_r f_r over processes: √w_r ρ_r, one below the other.

    Attributes:
        loss: f, 0-dim.
        residuals: ρ, (N,), float64.
        gradient: Jᵀρ, (n,).
        evaluations, backward_passes: of the process that made most.
        used: by parameter, whether the residuals of any process depend on it.
        smooth: whether finite residuals have finite derivatives.
        own: of this process's residuals, as its closure has them; None where it evaluates nothing.
        root: √w_r of this process.

    Cost: as of a :class:`ResidualJacobian` of this process's residuals; an exchange of a few bytes and a sum of N + n
        numbers.
    """

    @classmethod
    def at(cls, batch: SharedBatch, parameters: ParameterVector, known: KnownOwners) -> SharedJacobian:
        """From a batch that has not been evaluated yet; all processes call this together.

        Args:
            known: what earlier Jacobians of this process have found; taken up and completed.

        Raises:
            ValueError: a hook changes gradients.
            NoResidualsError: as for :class:`ResidualJacobian`, in its process; the others raise OtherProcessError.
        """
        found: list[ResidualJacobian] = []

        def evaluate() -> _Facts:
            if batch.own is None:
                return _Facts()
            assert isinstance(batch.own, FrozenClosure)
            own = ResidualJacobian.at(batch.own, parameters, known)
            found.append(own)
            returned = batch.own.returned
            return _Facts(
                count=len(own.residuals),
                dtype=own.loss.dtype,
                used=own.used,
                forms=own.forms,
                evaluations=own.evaluations,
                passes=own.backward_passes,
                smooth=own.course.finite,
                hooked=own.hooked,
                eps=own.eps,
                returned=None if returned is None else batch.share * float(returned),
            )

        every = batch.processes.gather(evaluate)
        return cls(batch, parameters, found[0] if found else None, every)

    def __init__(
        self, batch: SharedBatch, parameters: ParameterVector, own: ResidualJacobian | None, every: Sequence[_Facts]
    ) -> None:
        active = [facts for facts in every if facts.dtype is not None]
        if any(facts.hooked for facts in active):
            refuse_hooks()
        self.own, self.root = own, math.sqrt(batch.share)
        sizes, device = parameters.sizes, parameters.device
        rows = JacobianRows([None] * len(sizes), sizes, 0, device) if own is None else own.times(self.root)
        of_parameters = zip(*(facts.forms for facts in active), strict=True)
        form = [Form.common(forms, size) for forms, size in zip(of_parameters, sizes, strict=True)]
        super().__init__(Stack(batch.processes, [facts.count for facts in every]), rows, form)
        self.used = [any(uses) for uses in zip(*(facts.used for facts in active), strict=True)]
        self.evaluations = max(facts.evaluations for facts in active)
        self.backward_passes = max(facts.passes for facts in active)
        self.eps = max(facts.eps for facts in active)
        self.smooth = all(facts.smooth for facts in active)
        loss, self.gradient, self.residuals = self._evaluated(batch)
        self.loss = loss.to(active[0].dtype)
        returned = [facts.returned for facts in every if facts.returned is not None]
        batch.returned = self.loss.new_tensor(sum(returned)) if len(returned) == len(every) else None

    def _evaluated(self, batch: SharedBatch) -> Sequence[Tensor]:
        """Loss, gradient and residuals of all; one sum."""
        sizes = [1, self.shape[1], self.shape[0]]

        def part() -> Tensor | None:
            if self.own is None:
                return None
            residuals = self.root * self.own.residuals
            whole = residuals.new_zeros(self.shape[0])
            whole[self.stack.place] = residuals
            loss = batch.share * self.own.loss.reshape(1).to(residuals)
            return torch.cat([loss, self._own.rmatvec(residuals), whole])

        loss, gradient, residuals = batch.processes.sum(part, sum(sizes), self).split(sizes)
        return loss[0], gradient, residuals
