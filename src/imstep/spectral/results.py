"""What an estimation finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An estimated number.

    Attributes:
        value: the number.
        error: the true one lies within this of it, with probability 95 %.
        products: products with A that were spent.
        converged: whether the error asked for was reached.
    """

    value: float
    error: float
    products: int
    converged: bool

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """An estimated diagonal.

    Attributes:
        value: the diagonal, (n,).
        error: of each entry, (n,): the true one lies within this of it, with probability 95 %.
        products: products with A that were spent.
        converged: whether the error asked for was reached.
    """

    value: Tensor
    error: Tensor
    products: int
    converged: bool
