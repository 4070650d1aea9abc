"""The curvature of a batch in two halves, and the test for mini-batch noise that needs it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from imstep.linalg.operator import LinearOperator, check_alike


class HalvedOperator(LinearOperator):
    """A = (A₁ + A₂)/2 that can tell the curvatures of its halves: what `NoiseTest` needs.

    A subclass gives `measure`, at best from one pass over the batch. One call of it counts as one product.
    """

    @abstractmethod
    def measure(self, vector: Tensor) -> tuple[Tensor, float, float]:
        """(A v, vᵀA₁v, vᵀA₂v) for one vector (n,)."""

    def matvec(self, vector: Tensor) -> Tensor:
        return self.measure(vector)[0]


class SplitOperator(HalvedOperator):
    """The mean of two operators, such as the curvatures of the two halves of a batch.

    Raises:
        ValueError: the two differ in size, dtype or device.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A = SplitOperator(DiagonalOperator(torch.tensor([1.0])), DiagonalOperator(torch.tensor([3.0])))
        >>> A.measure(torch.ones(1))
        (tensor([2.]), 1.0, 3.0)
    """

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        check_alike(first, second)
        super().__init__(first.size, first.dtype, first.device)
        self.first, self.second = first, second

    def measure(self, vector: Tensor) -> tuple[Tensor, float, float]:
        first, second = self.first.matvec(vector), self.second.matvec(vector)
        return (first + second) / 2, float(vector @ first), float(vector @ second)

    def matmat(self, block: Tensor) -> Tensor:
        return (self.first.matmat(block) + self.second.matmat(block)) / 2


@dataclass(frozen=True)
class NoiseTest:
    """Whether a curvature can be told from mini-batch noise.

    With c₁, c₂ the curvatures of the two halves, the mean is (c₁ + c₂)/2 and its standard error is estimated
    by |c₁ - c₂|/2; the direction disturbs if mean <= z · standard error.

    Args:
        z: how many standard errors the mean must exceed, > 0; 1 to 2 is sensible.

    Raises:
        ValueError: z is not positive.

    Source: our choice; the two-sample case of the t statistic.

    Example:
        >>> NoiseTest(z=1.0).disturbs(1.0, 1.2), NoiseTest(z=1.0).disturbs(-0.1, 1.2)
        (False, True)
    """

    z: float = 1.0

    def __post_init__(self) -> None:
        if not self.z > 0:
            raise ValueError(f"z must be positive, got {self.z}. To switch the test off pass noise=None.")

    def disturbs(self, first: float, second: float) -> bool:
        """Whether the curvatures `first` and `second` of the two halves are within noise of zero."""
        return (first + second) / 2 <= self.z * abs(first - second) / 2
