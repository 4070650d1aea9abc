"""Ways to factorise a Jacobian, or its Gram matrix, for damped least squares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix, KeptColumns, RowMatrix
from imstep.linalg.gram_nystrom import gram_nystrom
from imstep.linalg.partial_cholesky import partial_cholesky
from imstep.linalg.reduced import DampedLeastSquares, DenseLeastSquares, GramLeastSquares, ReducedLeastSquares


@dataclass(frozen=True, eq=False)
class StepSpace:
    """Damped least squares, and the steps d (n,) that its coordinates stand for.

    Attributes:
        vector: d from coordinates.
        project: the coordinates of the step that is nearest to a vector (n,); None where the minimum is over all steps.
    """

    reduced: DampedLeastSquares
    vector: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor] | None = None


class Factorisation(ABC):
    """How damped least squares come from a Jacobian J, (N, n)."""

    @abstractmethod
    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        """What solves for steps; for the arguments see :meth:`GramFactorisation.factorise`."""


def gram_space(jacobian: RowMatrix, reduced: GramLeastSquares) -> StepSpace:
    """The steps that are combinations of rows of J."""
    basis = jacobian if reduced.pivots is None else jacobian.rows(reduced.pivots)
    project = None if reduced.complete else lambda d: reduced.nearest(basis @ d)
    return StepSpace(reduced, lambda u: basis.T @ reduced.weights(u), project)


class GramFactorisation(Factorisation):
    """How damped least squares come from K = J Jᵀ."""

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        return gram_space(jacobian, self.factorise(jacobian.gram(), tolerance, draw))

    @abstractmethod
    def factorise(self, matrix: GramMatrix, tolerance: float, draw: int) -> GramLeastSquares:
        """What solves for steps.

        Args:
            matrix: K, float64.
            tolerance: trace of what may be left out of K, >= 0.
            draw: numbers the calls: random numbers follow from it and nothing else.
        """


@dataclass(frozen=True)
class PivotedCholesky(GramFactorisation):
    """Few columns of K, as many as the tolerance asks for, or else all: :func:`partial_cholesky`.

    Where few do not do, because the eigenvalues of K do not fall fast, or what is left out is below rounding, all of K
    is factorised as by :class:`DenseFactorisation`.

    Args:
        most: columns up to which they are few, as a fraction of N, in [0, 1].

    Source: the fraction is our choice: a third of the columns have cost about N³/3 operations, as much as one Cholesky
        factorisation of K.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> K = DenseGram(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
        >>> PivotedCholesky(most=1).factorise(K, 1e-3, draw=0).rank
        2
    """

    most: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise ValueError(f"most is a fraction of all columns, in [0, 1], got {self.most}.")

    def factorise(self, matrix: GramMatrix, tolerance: float, draw: int) -> GramLeastSquares:
        kept = KeptColumns(matrix)
        found = partial_cholesky(kept, tolerance, most=round(self.most * matrix.size))
        return ReducedLeastSquares(found) if found.remainder <= tolerance else DenseLeastSquares(kept)


@dataclass(frozen=True)
class RandomizedNystrom(GramFactorisation):
    """Few random combinations of the columns of K, as many as the tolerance asks for: :func:`gram_nystrom`.

    Args:
        seed: of the random numbers, an integer; the global generator is left alone.

    Source: for natural gradients of physics-informed networks, Guzmán-Cordero et al. (arXiv 2505.12149), with a fixed
        size of the sketch.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> K = DenseGram(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
        >>> RandomizedNystrom(seed=1).factorise(K, 1e-3, draw=0).rank
        2
    """

    seed: int = 0

    def factorise(self, matrix: GramMatrix, tolerance: float, draw: int) -> GramLeastSquares:
        # A prime apart, so that the draws of small seeds do not meet within a million.
        generator = torch.Generator(device=matrix.device).manual_seed(1_000_003 * self.seed + draw)
        return ReducedLeastSquares(gram_nystrom(matrix, tolerance, generator=generator))


@dataclass(frozen=True)
class DenseFactorisation(GramFactorisation):
    """All of K, by Cholesky's factorisation anew for each λ: nothing is left out, whatever the tolerance.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> K = DenseGram(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
        >>> DenseFactorisation().factorise(K, 1e-3, draw=0).rank
        3
    """

    def factorise(self, matrix: GramMatrix, tolerance: float, draw: int) -> GramLeastSquares:
        return DenseLeastSquares(matrix)
