"""The curvature of a batch in two halves, and the test for mini-batch noise that needs it."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from imstep.linalg.fitting import check_alike
from imstep.linalg.operator import LinearOperator


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
    by |c₁ - c₂|/2, from one difference; the direction disturbs if mean <= z · standard error. With c₁ <= c₂ that is
    (1 + z) c₁ <= (z - 1) c₂: for z = 1 if either half sees no positive curvature, which two positive semidefinite
    halves never do, for z = 2 if one sees less than a third of the other's. How often noise alone does it: `rate`.

    Args:
        z: how many standard errors the mean must exceed, > 0; 1 to 2 is sensible, above 1 for a matrix such as
            Gauss-Newton's.

    Raises:
        ValueError: z is not positive.

    Source: our choice; the two-sample case of the t statistic, which has one degree of freedom.

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

    def rate(self, signal: float) -> float:
        """The probability that a direction disturbs, if the halves' curvatures are independent and normal.

        With δ the true curvature in standard errors of the batch's mean, h = δ/√(1 + z²) and Owen's function
        T(h, z) = 1/2π ∫₀ᶻ exp(-h²(1 + x²)/2)/(1 + x²) dx,

            P = 1 - Φ(h) + 2 T(h, z),

        since (mean, difference/2) is a round normal pair about (δ, 0), and trust a wedge of slope z about the
        first axis. Without any curvature, δ = 0, trust keeps a probability of arctan(1/z)/π: 1/4 for z = 1, 0.15
        for z = 2; more than a known variance would leave, one difference being all that is known of it.

        Args:
            signal: δ = √2 μ/σ, where a half's curvature has mean μ and standard deviation σ; of any sign.

        Source: Owen, Tables for computing bivariate normal probabilities, Ann. Math. Statist. 27 (1956).

        Example:
            >>> [round(NoiseTest(z=1.0).rate(signal), 3) for signal in (0.0, 2.0, 4.0)]
            [0.75, 0.151, 0.005]
        """
        h = signal / math.hypot(1.0, self.z)
        nodes, weights = np.polynomial.legendre.leggauss(64)
        # x = tan(φ) makes the integrand smooth and the interval finite for every z.
        angles = math.atan(self.z) / 2 * (1 + nodes)
        owen = math.atan(self.z) / 2 * float(weights @ np.exp(-((h / np.cos(angles)) ** 2) / 2)) / (2 * math.pi)
        return math.erfc(h / math.sqrt(2)) / 2 + 2 * owen
