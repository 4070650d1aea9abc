"""Factorisations of a Jacobian of any shape, and the choice among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from imstep.linalg.condensed import in_all_rows
from imstep.linalg.gram import BLOCK, GramMatrix, KeptColumns, RowMatrix
from imstep.linalg.gram_factor import FIRST, LEAST, GramFactor
from imstep.linalg.gram_factorisation import DenseFactorisation, Factorisation, StepSpace, gram_space
from imstep.linalg.iterative import IterativeLeastSquares
from imstep.linalg.normal import NormalEquations
from imstep.linalg.partial_cholesky import partial_cholesky
from imstep.linalg.partial_qr import ROUNDING, RowLeastSquares, partial_qr
from imstep.linalg.reduced import DenseLeastSquares, ReducedLeastSquares
from imstep.linalg.sketched_rows import sketched_rows
from imstep.linalg.thin import ThinLeastSquares
from imstep.linalg.triangular import BlockQR, TriangularLeastSquares

_SOUND = 1e-9
"""Of the trace of JJᵀ: what columns can leave that rounding has not spoilt."""

_MORE = 3
"""Times the rows that would do if each took as much of what is left as a column does on average: up to so many."""

_NARROW = 1 / 4
"""Rows, over columns of J, up to which they are looked for in a sketch: it has five quarters as many columns."""


@dataclass(frozen=True)
class ThinFactorisation(Factorisation):
    """J itself, written out, as accurate as its condition allows: its singular values, or its QR factors.

    Args:
        values: columns up to which singular values are taken, which serve all λ; so they are where J has fewer rows
            than columns. Else J = Q R serves all λ, and R is factorised for each: :class:`TriangularLeastSquares`.

    Cost: with N rows and n columns, 2 N n² operations, 10 n³/3 for each λ, and up to 2 N n + 6 n² numbers.

    Source: the length is our choice: of a triangle of 100 columns singular values take as long as five factorisations.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseRows
        >>> ThinFactorisation().of(DenseRows(torch.eye(4, 3, dtype=torch.float64)), 0.0, draw=0).reduced.rank
        3
    """

    values: int = 100

    def __post_init__(self) -> None:
        if self.values < 0:
            raise ValueError(f"values, a number of columns, is at least 0, got {self.values}.")

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        count, size = jacobian.shape
        rows, rotation = jacobian.condensed()
        if size <= self.values or count < size:
            thin = ThinLeastSquares(rows.written_out())
            return in_all_rows(StepSpace(thin, thin.vector), rotation)
        triangular = TriangularLeastSquares(BlockQR(rows.blocks(BLOCK)))
        return in_all_rows(StepSpace(triangular, triangular.vector), rotation)


@dataclass(frozen=True)
class PivotedQR(Factorisation):
    """Few rows of J, written out, as many as the tolerance asks for, or else all.

    By :func:`sketched_rows` where J has four times as many columns as they may be, else by :func:`partial_qr`. What
    they leave is known to the square of rounding, where columns of J Jᵀ, of which as few would do, are cheaper but soon
    spoilt. Where few do not do, it is as :class:`ThinFactorisation`, or as :class:`DenseFactorisation` where J has
    fewer rows than columns.

    Args:
        most: rows up to which they are few, >= 0; None for :meth:`few`.

    Cost: with k rows 2 N n k to 4 N n k operations, 4 k³/3 for each λ, and up to 2 N n + 6 k² numbers; of wide J about
        4 n k² and 4 N k² operations, and n k + N k numbers.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseRows
        >>> J = DenseRows(torch.diag(torch.tensor([1.0, 1e-5, 1e-9])).double())
        >>> PivotedQR(most=3).of(J, 1e-14, draw=0).reduced.rank
        2
    """

    most: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 0:
            raise ValueError(f"most, a number of rows, is at least 0, got {self.most}.")

    @staticmethod
    def few(count: int, size: int) -> int:
        """What costs at most about as much as QR factors of J, (count, size), or J Jᵀ and its Cholesky factor.

        Source: our choice.
        """
        return min(size // 2, count // 3, int(count**1.5 / size**0.5)) if size else 0

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        rows, rotation = jacobian.condensed()
        most = self.few(*rows.shape) if self.most is None else self.most
        if most <= _NARROW * rows.shape[1]:
            found = sketched_rows(rows, tolerance, most=most, draw=draw)
        else:
            found = partial_qr(rows.written_out(), tolerance, most=most)
        if not found.remainder <= tolerance:
            return _whole(jacobian).of(jacobian, tolerance, draw)
        reduced = RowLeastSquares(found)
        return in_all_rows(StepSpace(reduced, reduced.vector, lambda d: found.basis.mT @ d), rotation)


def _whole(jacobian: RowMatrix) -> Factorisation:
    """All of J Jᵀ, or of J where that has no fewer rows than columns."""
    return ThinFactorisation() if jacobian.shape[1] <= jacobian.shape[0] else DenseFactorisation()


@dataclass(frozen=True)
class SketchedFactorisation(Factorisation):
    """Few columns of K = J Jᵀ; where they do not do, they precondition conjugate gradients with J.

    Args:
        columns: at most, >= 1; taken in blocks, the first of 48. With fewer there is no preconditioner.

    Cost: with k columns N k² operations and (2 N + n) k numbers, nothing of N² or N n; 4 N k a correction, or some ten
        to two hundred products with J and Jᵀ. :class:`IterativeLeastSquares`.

    Source: the number is our choice.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseRows
        >>> J = DenseRows(torch.eye(400, 300, dtype=torch.float64))
        >>> SketchedFactorisation(columns=50).of(J, 0.0, draw=0).reduced.kind
        'sketch'
    """

    columns: int = 1000

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns is at least 1, got {self.columns}.")

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        found = partial_cholesky(jacobian.gram(), tolerance, most=self.columns)
        if found.remainder <= tolerance:
            return gram_space(jacobian, ReducedLeastSquares(found))
        iterative = IterativeLeastSquares(jacobian, found)
        return StepSpace(iterative, iterative.vector)


@dataclass(frozen=True)
class ByShape(Factorisation):
    """The cheapest way that a Jacobian's shape, memory and λ allow.

    1. With one side up to ``narrow`` and entries up to ``entries``, as in a fit with few parameters: the singular
       values of J, which tell small steps from rounding: :class:`ThinFactorisation`.
    2. Few columns of J Jᵀ while they do, as by :class:`PivotedCholesky`: no more than make the next ways cheaper.
    3. All of JᵀJ where λ is above its rounding and J has no fewer rows than columns, :class:`NormalEquations`.
    4. Few rows of J where rounding has spoilt those columns, :class:`PivotedQR`; of large J, with entries times the
       shorter side of ``large`` and more.
    5. All of J Jᵀ where J has fewer rows than columns, :class:`DenseFactorisation`; else the QR factors of J.
    6. Where that does not fit ``memory``, conjugate gradients that the few columns precondition:
       :class:`SketchedFactorisation`.

    Args:
        wide: for all shapes but those of 1; None to go on to 2.
        narrow, entries, large: the bounds, >= 0; they are our choice.
        memory: bytes for all of J Jᵀ, or J written out, and what their factorisation takes beside; >= 0.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseRows
        >>> ByShape().of(DenseRows(torch.eye(400, 2, dtype=torch.float64)), 0.0, draw=0).reduced.rank
        2
    """

    wide: Factorisation | None = None
    narrow: int = 100
    entries: int = 2**20
    memory: int = 2**31
    large: int = 2**30

    def __post_init__(self) -> None:
        if self.wide is not None and not isinstance(self.wide, Factorisation):
            raise TypeError(f"wide must be a Factorisation, got {self.wide!r}.")
        bounds = {name: getattr(self, name) for name in ("narrow", "entries", "memory", "large")}
        if min(bounds.values()) < 0:
            raise ValueError(f"{', '.join(bounds)} are at least 0, got {', '.join(map(str, bounds.values()))}.")

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        count, size = jacobian.shape
        if min(count, size) <= self.narrow and count * size <= self.entries:
            return ThinFactorisation(values=self.narrow).of(jacobian, tolerance, draw)
        if self.wide is not None:
            return self.wide.of(jacobian, tolerance, draw)
        # J with the reflections over it, and its triangle with what a λ makes of that; or K, its copy and its factor.
        numbers = 2 * count * size + 6 * size**2 if size <= count else 3 * count**2
        if 8 * numbers > self.memory:
            return SketchedFactorisation().of(jacobian, tolerance, draw)
        gram, trace, found = KeptColumns(jacobian.gram()), jacobian.squared_norm(), None
        spoilt = tolerance < LEAST * trace
        if not spoilt:
            # About what costs as much as QR factors of J, or Cholesky's factorisation of K.
            found = partial_cholesky(gram, tolerance, most=min(round(count / 3), size // 2))
            if found.remainder <= tolerance:
                return gram_space(jacobian, ReducedLeastSquares(found))
            if size <= count:
                return NormalEquations().of(jacobian, tolerance, draw)
        if rows := self._few_rows(gram, size, trace, tolerance, found):
            return PivotedQR(most=rows).of(jacobian, tolerance, draw)
        if size <= count:
            return ThinFactorisation().of(jacobian, tolerance, draw)
        return gram_space(jacobian, DenseLeastSquares(gram))

    def _few_rows(self, gram: GramMatrix, size: int, trace: float, tolerance: float, found: GramFactor | None) -> int:
        """Up to how many rows of J to look for; 0 where that is not worth it.

        As where J has fewer rows than columns and columns of J Jᵀ, ``found`` or else looked for here, leave much even
        before rounding spoils them.
        """
        count = gram.size
        most = PivotedQR.few(count, size)
        if most < FIRST or count * size * min(count, size) < self.large or 16 * count * size > self.memory:
            return 0
        if size <= count:
            return most
        decades_of = lambda left: math.log(max(left / trace, ROUNDING))
        if found is None:
            found = partial_cholesky(gram, _SOUND * trace, most=int(most * math.log(_SOUND) / decades_of(tolerance)))
        if found.remainder > _SOUND * trace:
            return 0
        return min(most, round(_MORE * found.rank * decades_of(tolerance) / decades_of(found.remainder)))
