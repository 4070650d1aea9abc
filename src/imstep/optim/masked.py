"""Operators on the part of a vector that is not held fixed."""

from __future__ import annotations

from torch import Tensor

from imstep.linalg import LinearOperator


class MaskedOperator(LinearOperator):
    """M A M for an operator A and the diagonal M of zeros and ones.

    Args:
        operator: A.
        mask: the diagonal, (n,).
    """

    def __init__(self, operator: LinearOperator, mask: Tensor) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self._operator, self._mask = operator, mask

    def matvec(self, vector: Tensor) -> Tensor:
        return self._mask * self._operator.matvec(self._mask * vector)

    def matmat(self, block: Tensor) -> Tensor:
        mask = self._mask[:, None]
        return mask * self._operator.matmat(mask * block)


def masked(operator: LinearOperator, mask: Tensor | None) -> LinearOperator:
    """M A M; A itself without a mask."""
    return operator if mask is None else MaskedOperator(operator, mask)
