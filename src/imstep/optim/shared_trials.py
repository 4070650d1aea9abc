"""Residuals of several processes at trial points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.shared import SharedBatch
from imstep.curvature.shared_jacobian import SharedJacobian
from imstep.curvature.squares import NoResidualsError
from imstep.optim.balancing import Weighted
from imstep.optim.chord import FIXED_NUMBER
from imstep.optim.record import Cost
from imstep.optim.residual_trials import ResidualTrials


class SharedTrials:
    """The trials of one step of :class:`LeastSquares` over processes; the counterpart of :class:`ResidualTrials`.

    Args:
        batch: of which this process evaluates a part.
        parameters, snapshot: see :class:`ResidualTrials`.
        jacobian: the linearisation at the start.

    Attributes:
        spent: on trials, which all processes make together.
        follows: whether a trial's residuals differ from those of the start.
    """

    def __init__(
        self, batch: SharedBatch, parameters: ParameterVector, snapshot: Sequence[Tensor], jacobian: SharedJacobian
    ) -> None:
        self._batch, self._parameters, self._snapshot, self._jacobian = batch, parameters, snapshot, jacobian
        self.spent, self.follows = Cost(), False
        self._own: ResidualTrials | None = None
        if jacobian.own is not None:
            assert isinstance(batch.own, FrozenClosure)
            self._own = ResidualTrials(batch.own, parameters, snapshot, jacobian.own)

    def residuals_at(self, step: Tensor) -> Tensor:
        """ρ(w + d), (N,); nan for those of a process that cannot evaluate its own. Leaves the parameters there."""
        self.spent += Cost(losses=1)

        def own() -> Tensor:
            if self._own is None:
                return self._nothing(step)
            values, count = self._own.residuals_at(step), self._own.count
            if len(values) != count:
                raise NoResidualsError(FIXED_NUMBER.format(count, len(values), "those of processes are joined"))
            return self._jacobian.root * values

        values = self._jacobian.stack.join(own, self._jacobian, at=step)
        self.follows = self.follows or not torch.equal(values, self._jacobian.residuals)
        return values

    def gradient_at(self, step: Tensor, weighted: Weighted | None = None) -> Tensor:
        """∇f(w + d), (n,), without a penalty; leaves the parameters there. Terms are not balanced over processes."""
        assert weighted is None
        self.spent += Cost(jacobian_passes=1)

        def own() -> Tensor | None:
            if self._own is None:
                self._nothing(step)
                return None
            return self._batch.share * self._own.gradient_at(step)  # by the graph of its trial, if it was there last

        return self._batch.processes.sum(own, self._parameters.size, self._parameters, step)

    def finite_at(self, step: Tensor) -> bool:
        """Whether the gradient at w + d, where the residuals are, is finite; leaves the parameters there."""
        if self._jacobian.smooth:
            self._move(step)
            return True
        return bool(self.gradient_at(step).isfinite().all())

    def _nothing(self, step: Tensor) -> Tensor:
        """What a process finds that evaluates nothing."""
        self._move(step)
        return torch.zeros(0, dtype=torch.float64, device=step.device)

    def _move(self, step: Tensor) -> None:
        self._parameters.move(self._snapshot, step.to(self._parameters.dtype), 1.0)
