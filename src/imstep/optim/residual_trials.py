"""Residuals at trial points: run again as a list of operators where that is known to do, else by the closure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.complexstep.later import later_grad
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import ResidualJacobian
from imstep.curvature.squares import NoResidualsError, require_residuals
from imstep.curvature.staleness import check_fresh, nodes_of
from imstep.curvature.state import State
from imstep.optim.balancing import Weighted
from imstep.optim.evaluable import outside_the_domain
from imstep.optim.record import Cost

_SLACK = 1e3
"""Times the rounding of a loss: by so much may change what it is more than the squares of residuals."""

_COARSE = 0.05
"""What that comes to at most, in dtypes of few digits."""


class ResidualTrials:
    """The trials of one step of :class:`LeastSquares`.

    Args:
        frozen: the closure.
        parameters: of it.
        snapshot: where the step begins.
        jacobian: the linearisation there.

    Attributes:
        spent: on trials.
        follows: whether a trial's residuals differ from those of the start.
    """

    def __init__(
        self,
        frozen: FrozenClosure,
        parameters: ParameterVector,
        snapshot: Sequence[Tensor],
        jacobian: ResidualJacobian,
    ) -> None:
        self._frozen, self._parameters, self._snapshot = frozen, parameters, snapshot
        self._course, self._start, self._rest = jacobian.course, jacobian.residuals, jacobian.rest
        self._loss, self._eps = jacobian.loss, jacobian.eps
        self.spent, self.follows = Cost(), False
        # The closure's last step (n,), its loss with its graph, and the buffers that this has read.
        self._there: tuple[Tensor, Tensor, State] | None = None

    @property
    def count(self) -> int:
        """N."""
        return len(self._start)

    def residuals_at(self, step: Tensor) -> Tensor:
        """ρ(w + d), (N,); nan where the closure cannot be evaluated there. Leaves the parameters there.

        They are more or fewer where the loss is of others there.

        Raises:
            NoResidualsError: the loss has a part that changes and has no derivative.
        """
        self._move(step)
        self.spent += Cost(losses=1)
        again = self._course.again()
        if again is not None and self._course.trusted:
            whole, constants = again.double(), self._rest is not None
        else:
            whole, constants = self._by_closure(step)
            self._course.compare(again, whole)
        values = whole[:-1] if constants else whole
        if (constants or self._rest is not None) and bool(values.isfinite().all()):
            self._same_rest(float(whole[-1]) if constants else 0.0, values)
        self.follows = self.follows or not torch.equal(values, self._start)
        return values

    def gradient_at(self, step: Tensor, weighted: Weighted | None = None) -> Tensor:
        """∇f(w + d), (n,), without a penalty, of the loss with weights if there are any; leaves the parameters there.
        """
        if self._there is None or not torch.equal(self._there[0], step):
            self._move(step)
            self.spent += Cost(losses=1)
            self._by_closure(step)
        assert self._there is not None
        self.spent += Cost(jacobian_passes=1)
        (_, loss, state), tensors = self._there, self._parameters.tensors
        with self._frozen.as_in(state):
            if weighted is None:
                return self._parameters.flatten(later_grad(loss, tensors, whole=True, steered=False))
            residuals = require_residuals(loss, tensors)
            cotangent = weighted.cotangent(residuals.values)
            return self._parameters.flatten(residuals.pull_back(cotangent, tensors, steered=False))

    def finite_at(self, step: Tensor) -> bool:
        """Whether the gradient at w + d, where the residuals are, is finite; leaves the parameters there."""
        if self._course.finite:
            self._move(step)
            return True
        return bool(self.gradient_at(step).isfinite().all())

    def _move(self, step: Tensor) -> None:
        self._parameters.move(self._snapshot, step.to(self._parameters.dtype), 1.0)

    def _by_closure(self, step: Tensor) -> tuple[Tensor, bool]:
        """ρ(w + d), and whether a last entry is the rest of the loss."""
        with self._frozen.beside():
            try:
                loss = self._frozen.loss_with_graph()
            except Exception as error:
                if not outside_the_domain(error):
                    raise
                return torch.full_like(self._start, math.nan), False
            state, residuals = self._frozen.state(), require_residuals(loss, self._parameters.tensors)
            if self._there is None and not self._course.nodes.isdisjoint(nodes_of(loss)):
                self.spent += Cost(losses=1)  # the numbers of nodes may agree by chance, the nodes themselves do not
                check_fresh(loss, self._frozen.loss_with_graph(), self._parameters.tensors)
        self._there = step, loss, state
        return residuals.whole.double(), len(residuals.whole) > len(residuals.values)

    def _same_rest(self, rest: float, values: Tensor) -> None:
        """Whether what the loss is more than ρᵀρ/2 is what it was where the step begins; or refuse."""
        before, loss = self._rest or 0.0, float(self._loss)
        size = max(abs(rest), abs(before), abs(loss), float(values @ values) / 2)
        if abs(rest - before) > min(_SLACK * self._eps, _COARSE) * size:
            raise NoResidualsError(
                "the loss has a part besides its squares that follows the parameters and has no derivative: it is "
                f"{before:.6g} where the step begins and {rest:.6g} at a trial point. Put it into a square, as in "
                "torch.where(r.abs() < c, r, c).square() for torch.where(r.abs() < c, r.square(), c**2); or leave "
                "out of the loss what is detached."
            )
