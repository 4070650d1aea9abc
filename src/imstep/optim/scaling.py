"""In what units steps of least squares are measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import RowMatrix


class Scaling(ABC):
    """The D of the damping λ‖D d‖²."""

    @abstractmethod
    def norms(self, jacobian: RowMatrix, last: Tensor | None) -> Tensor | None:
        """The diagonal of D, (n,), where 0 stands for 1; None for D = 1.

        Args:
            jacobian: J at the new point.
            last: what this returned at the last one; None at the first.
        """

    def reach(self, scaled: Tensor, first: bool) -> float:
        """The longest ‖D d‖ of a step from w, given D w (n,) and whether it is the first of all."""
        return math.inf


@dataclass(frozen=True)
class Unscaled(Scaling):
    """D = 1: all parameters have one unit, as the weights of a network do. J is not written out."""

    def norms(self, jacobian: RowMatrix, last: Tensor | None) -> Tensor | None:
        return None


@dataclass(frozen=True)
class ColumnNorms(Scaling):
    """The norms of the columns of J, so that steps do not depend on the parameters' units. J is written out,
    in blocks where that is what its factorisation takes.

        D <- max(‖J e_i‖, memory D),   ‖D d‖ <= factor ‖D w‖ for the first step d, if w is not 0

    Args:
        memory: of larger norms met before, in [0, 1]; 1 for the largest so far, as in MINPACK.
        factor: > 0.

    Source: Moré, The Levenberg-Marquardt algorithm: implementation and theory (1978), section 6, and MINPACK. That
        norms fade is ours: on NIST's regressions 0.5 finds 54 of 54, 0.7 and 1 find 53, 0 finds 51. The factor is 100
        in MINPACK, with which BoxBOD's first start leads to infinity, as it does there; 1 and 10 are alike.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> scaling, J = ColumnNorms(memory=1), torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=torch.float64)
        >>> first = scaling.norms(DenseRows(J), None)
        >>> scaling.norms(DenseRows(J.flip(1) / 2), first)
        tensor([5.0000, 2.5000], dtype=torch.float64)
    """

    memory: float = 0.5
    factor: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory must lie in [0, 1], got {self.memory}.")
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}.")

    def norms(self, jacobian: RowMatrix, last: Tensor | None) -> Tensor | None:
        now = jacobian.column_norms()
        return now if last is None else torch.maximum(now, self.memory * last)

    def reach(self, scaled: Tensor, first: bool) -> float:
        return (self.factor * float(scaled.norm()) or math.inf) if first else math.inf
