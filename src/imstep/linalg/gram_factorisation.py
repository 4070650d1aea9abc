"""Ways to factorise a Jacobian, or its Gram matrix, for damped least squares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix, RowMatrix
from imstep.linalg.gram_nystrom import gram_nystrom
from imstep.linalg.partial_cholesky import partial_cholesky
from imstep.linalg.reduced import DampedLeastSquares, DenseLeastSquares, GramLeastSquares, ReducedLeastSquares
from imstep.linalg.thin import ThinLeastSquares


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


@dataclass(frozen=True)
class ThinFactorisation(Factorisation):
    """The singular values of J, which is written out: :class:`ThinLeastSquares`.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> ThinFactorisation().of(DenseRows(torch.eye(4, 3, dtype=torch.float64)), 0.0, draw=0).reduced.rank
        3
    """

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        thin = ThinLeastSquares(jacobian.written_out())
        return StepSpace(thin, thin.vector)


class GramFactorisation(Factorisation):
    """How damped least squares come from K = J Jᵀ."""

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        reduced = self.factorise(jacobian.gram(), tolerance, draw)
        basis = jacobian if reduced.pivots is None else jacobian.rows(reduced.pivots)
        project = None if reduced.complete else lambda d: reduced.nearest(basis @ d)
        return StepSpace(reduced, lambda u: basis.T @ reduced.weights(u), project)

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
        found = partial_cholesky(matrix, tolerance, most=round(self.most * matrix.size))
        return ReducedLeastSquares(found) if found.remainder <= tolerance else DenseLeastSquares(matrix)


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


@dataclass(frozen=True)
class ByShape(Factorisation):
    """Singular values where J is small, else another factorisation.

    Small is a J with one side up to ``narrow`` and entries up to ``entries``: as those of a fit with few parameters.
    There the singular values cost little and tell small steps from rounding, which JJᵀ, with the square of J's
    condition, does not.

    Args:
        wide: for all other shapes.
        narrow, entries: the bounds, >= 0; both are our choice.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> ByShape().of(DenseRows(torch.eye(400, 2, dtype=torch.float64)), 0.0, draw=0).reduced.rank
        2
    """

    wide: Factorisation = PivotedCholesky()
    narrow: int = 100
    entries: int = 2**20

    def __post_init__(self) -> None:
        if not isinstance(self.wide, Factorisation):
            raise TypeError(f"wide must be a Factorisation, got {self.wide!r}.")
        if self.narrow < 0 or self.entries < 0:
            raise ValueError(f"narrow and entries are at least 0, got {self.narrow} and {self.entries}.")

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        count, size = jacobian.shape
        small = min(count, size) <= self.narrow and count * size <= self.entries
        return (ThinFactorisation() if small else self.wide).of(jacobian, tolerance, draw)
