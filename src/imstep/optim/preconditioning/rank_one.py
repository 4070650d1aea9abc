"""A quasi-Newton model of the curvature itself, which may be indefinite: symmetric rank-one updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import DenseOperator, IdentityOperator, LinearOperator, RankOneOperator, sr1_update
from imstep.linalg.dots import norm_in_range
from imstep.linalg.quasi_newton import curved
from imstep.optim.preconditioning.base import OTHER_STATE, Preconditioner, Preconditioning
from imstep.optim.preconditioning.quasi_newton import LimitedSecants, Secant
from imstep.optim.preconditioning.recycling import inverse_size


@dataclass(frozen=True)
class RankOneModel(Preconditioning):
    """A matrix B ≈ A learnt from steps s and changes y of the gradient by SR1, for the solver :class:`LearntModel`.

        B <- B + r rᵀ / rᵀs,   r = y - B s

    B may be indefinite, and is no preconditioner: it stands in the place of A. It begins as a multiple of the identity:
    ‖g‖ before the first step, which so has length 1, then yᵀy / yᵀs.

    Args:
        pairs: how many steps count, >= 1, for two vectors of memory each (L-SR1); None for all, with a matrix of the
            parameters' number squared.
        exact: take y = A s, a product with the curvature where the step ends, in place of the difference of two
            gradients; it has no need of two steps on the same batch.
        limit: largest number of parameters where ``pairs`` is None, >= 1.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), sections 6.2 and 7.2; see
        :class:`~imstep.linalg.RankOneOperator`.
    """

    pairs: int | None = 10
    exact: bool = False
    limit: int = 4096

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs, the steps that count, is at least 1, or None for all; got {self.pairs}.")
        if self.limit < 1:
            raise ValueError(f"limit, the largest number of parameters, is at least 1, got {self.limit}.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        if self.pairs is not None:
            return _LimitedMemory(parameters, self.exact, self.pairs)
        if parameters.size > self.limit:
            raise ValueError(
                f"RankOneModel(pairs=None) keeps a matrix of the parameters' number squared, and there are "
                f"{parameters.size:,} parameters; its limit is {self.limit:,}. Say how many pairs count, or pass "
                f"limit={parameters.size}."
            )
        return _Dense(parameters, self.exact)


class _Model(Secant):
    """What both have in common: a model in place of a preconditioner."""

    def operator(self, damping: float) -> LinearOperator | None:
        return None

    def restart(self) -> None:
        """A step that failed says nothing against the pairs: the radius has shrunk."""

    def identity(self) -> LinearOperator:
        """‖g‖ I, of which the first step has length 1."""
        parameters = self._parameters
        norm = 1.0 if self._gradient is None else norm_in_range(self._gradient)
        return (norm or 1.0) * IdentityOperator(parameters.size, dtype=parameters.dtype, device=parameters.device)


class _LimitedMemory(_Model, LimitedSecants):
    def take(self, step: Tensor, change: Tensor) -> None:
        if bool(change.isfinite().all()):
            self._pairs.append((step, change))

    def model(self) -> LinearOperator:
        if not self._pairs:
            return self.identity()
        return RankOneOperator(list(self._pairs), 1 / inverse_size(reversed(self._pairs), 0.0))


class _Dense(_Model):
    _matrix: Tensor | None = None

    def take(self, step: Tensor, change: Tensor) -> None:
        if self._matrix is None:
            if not curved(step, change):
                return
            identity = torch.eye(len(step), dtype=step.dtype, device=step.device)
            self._matrix = identity / inverse_size([(step, change)], 0.0)
        # The update of an inverse with the roles of s and y exchanged.
        updated = sr1_update(self._matrix, change, step)
        if bool(updated.isfinite().all()):
            self._matrix = updated

    def model(self) -> LinearOperator:
        return self.identity() if self._matrix is None else DenseOperator(self._matrix)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "matrix": self._matrix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "matrix" not in state:
            raise ValueError(OTHER_STATE)
        super().load_state_dict(state)
        self._matrix = state["matrix"]
