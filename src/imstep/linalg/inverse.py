"""The inverse of a damped operator, as an operator: each product is a solve, with a certificate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_limit, check_not_negative, check_preconditioner
from imstep.linalg.block_cg import block_conjugate_gradient
from imstep.linalg.composed import ProductOperator
from imstep.linalg.fitting import check_vectors
from imstep.linalg.minres import minres
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus
from imstep.linalg.space import Space
from imstep.linalg.stopping import RelativeResidual
from imstep.linalg.symmetry import symmetric_part

F64 = torch.float64
_SMALL = 512
"""Rows up to which a matrix is decomposed: a second of arithmetic, and at most some iterative solves' products."""


_AIM = 1e-5
"""Relative residual that solves aim at by default, as those of `conjugate_gradient` do."""

_ROUNDING = 2.0**13
"""Units of rounding that a residual may have by default: 1e-3 in float32."""

_COARSEST = 0.1
"""The largest residual that is accepted by default: so many units of float16 or bfloat16 would be more than b."""

_ROUNDS = 2
"""Corrections at most: the first takes away what rounding left, and a second that of the first."""


class NotSolvedError(ArithmeticError):
    """A product with an inverse that was not found to the accuracy asked for; `solve` tells what was."""


@dataclass(frozen=True, eq=False)
class InverseSolution:
    """Solutions X of (A + λI) X = B, with their certificates.

    Attributes:
        solution: X, of B's shape; where a system was not solved, the best that was found.
        residual_norms: ‖b - (A + λI)x‖ / ‖b‖ for each column b, (k,), computed from x by a product; 0 for b = 0.
        converged: which of them meet the tolerance, (k,), of bool.
        statuses: why each solve ended, k of them.
        products: products with A that were spent, those of the certificates included.
    """

    solution: Tensor
    residual_norms: Tensor
    converged: Tensor
    statuses: tuple[KrylovStatus, ...]
    products: int


class DirectSolver(ABC):
    """A way to solve the systems of one matrix without iterations."""

    @abstractmethod
    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        """Solutions (k, n) for right-hand sides (k, n), and how each ended."""


def inverse(
    operator: LinearOperator,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    *,
    rtol: float | None = None,
    max_iterations: int | None = None,
) -> InverseOperator:
    """See :meth:`~imstep.linalg.LinearOperator.inverse`."""
    check_not_negative(damping=damping)
    check_limit(max_iterations)
    check_preconditioner(operator, preconditioner)
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"rtol, the largest relative residual of a product, lies in (0, 1), got {rtol}.")
    limit = min(10 * operator.size, 10_000) if max_iterations is None else max_iterations
    # What is aimed at by default is more than float32 may reach; then a thousandth has to do, and a tenth
    # in half precision.
    accepted = max(_AIM, min(_ROUNDING * torch.finfo(operator.dtype).eps, _COARSEST)) if rtol is None else rtol
    aim, direct = _AIM if rtol is None else rtol, operator.direct_solver(damping, rtol, limit)
    return InverseOperator(operator, damping, preconditioner, accepted, limit, aim=aim, direct=direct)


class InverseOperator(LinearOperator):
    """(A + λI)⁻¹ of a symmetric A; what `A.inverse(damping)` builds.

    Matrices of up to 512 rows are decomposed, once. Of JᵀJ + λI with fewer rows than columns, (JJᵀ + λI) is decomposed
    in its place:

        (JᵀJ + λI)⁻¹ b = (b - Jᵀ (JJᵀ + λI)⁻¹ J b) / λ

    Otherwise each system is solved by conjugate gradients, all columns of a block together, and by minimal residuals
    where A + λI proves indefinite. Whatever the way, residuals are computed anew from the solution.

    Raises:
        NotSolvedError: (in a product) a residual is above the tolerance, as where A + λI is singular.
        ValueError: A is found not to be symmetric.

    Cost: to decompose, n products once (for JᵀJ one with each row of J); else 1 an iteration. One more for the
    certificate of each column.

    Source: Woodbury's identity, Golub and Van Loan, Matrix Computations (4th ed.), section 2.1.4.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> B = DiagonalOperator(torch.tensor([1.0, 4.0, 0.0])).inverse()
        >>> found = B.solve(torch.tensor([1.0, 1.0, 0.0]))
        >>> found.solution, found.converged.tolist()
        (tensor([1.0000, 0.2500, 0.0000]), [True])
        >>> B.solve(torch.ones(3)).converged.tolist()
        [False]
    """

    def __init__(
        self,
        operator: LinearOperator,
        damping: float,
        preconditioner: LinearOperator | None,
        rtol: float,
        max_iterations: int,
        *,
        aim: float,
        direct: DirectSolver | None = None,
    ) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator, self.damping, self.preconditioner = operator, damping, preconditioner
        self.rtol, self.aim, self.max_iterations = rtol, aim, max_iterations
        self._direct = direct

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self.operator.spaces

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        found = self.solve(block)
        if not bool(found.converged.all()):
            raise self._refusal(found)
        return found.solution

    def solve(self, rhs: Tensor) -> InverseSolution:
        """Solutions for one vector (n,) or a block (n, k), and how good they are; refuses nothing that fits."""
        check_vectors(self, rhs)
        rows = (rhs[None] if rhs.ndim == 1 else rhs.mT).detach()
        solution, statuses, products = self._attempt(rows)
        left, sizes = self._residuals(rows, solution)
        products += len(rows)
        for _ in range(_ROUNDS):
            again = [
                at for at, status in enumerate(statuses)
                if status is KrylovStatus.CONVERGED and self.rtol < float(sizes[at]) < 0.5
            ]  # fmt: skip
            if not again:
                break
            # The residual computed anew is above that of the recurrence or before rounding: solve for the rest.
            better, statuses_again, spent = self._attempt(left[again])
            better = solution[again] + better
            left_again, sizes_again = self._residuals(rows[again], better)
            products += spent + len(again)
            for place, at in enumerate(again):
                if float(sizes_again[place]) < float(sizes[at]):
                    solution[at], left[at], sizes[at] = better[place], left_again[place], sizes_again[place]
                    statuses[at] = statuses_again[place]
        good = sizes <= self.rtol  # not for nan
        # A solver's own word counts for nothing against the residual of what is given out.
        reached = {True: KrylovStatus.CONVERGED, False: KrylovStatus.BREAKDOWN}
        told = [
            reached[ok] if ok or status is KrylovStatus.CONVERGED else status
            for status, ok in zip(statuses, good.tolist(), strict=True)
        ]
        return InverseSolution(solution[0] if rhs.ndim == 1 else solution.mT, sizes, good, tuple(told), products)

    def _attempt(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus], int]:
        """Solutions (k, n), why each ended, and the products spent."""
        if self._direct is not None:
            return *self._direct.solve(rows), 0
        if self.size <= _SMALL or self._wide() is not None:
            self._direct = self._decomposed()
            return *self._direct.solve(rows), self._direct.size
        return self._iterate(rows)

    def _wide(self) -> LinearOperator | None:
        """J where A = JᵀJ with fewer rows than columns, and the damping lets its rows do."""
        if not isinstance(self.operator, ProductOperator) or not self.damping > 0:
            return None
        first, second = self.operator.first, self.operator.second
        rows, columns = second.shape
        return second if (first.T is second or second.T is first) and rows < min(columns, 4 * _SMALL) else None

    def _decomposed(self) -> _Decomposed:
        wide = None if self.size <= _SMALL else self._wide()
        matrix = (self.operator if wide is None else wide.gram()).to_dense().to(F64)
        return _Decomposed(matrix, self.damping, wide, self.dtype)

    def _iterate(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus], int]:
        """By conjugate gradients; by minimal residuals what they leave because of negative curvature."""
        found = block_conjugate_gradient(
            self.operator, rows, self.damping, self.preconditioner, 0.5 * self.aim, self.max_iterations
        )
        statuses, products = list(found.statuses), found.products
        for at, status in enumerate(statuses):
            if status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE:
                other = minres(
                    self.operator,
                    rows[at],
                    damping=self.damping,
                    preconditioner=self.preconditioner,
                    stopping=[RelativeResidual(0.5 * self.aim)],
                    max_iterations=self.max_iterations,
                )
                found.solution[at], statuses[at] = other.solution, other.status
                products += other.products
        return found.solution, statuses, products

    def _residuals(self, rows: Tensor, solution: Tensor) -> tuple[Tensor, Tensor]:
        """b - (A + λI) x for each row, (k, n), and their norms relative to those of b, (k,)."""
        left = rows - self.operator.matmat(solution.mT).mT - self.damping * solution
        sizes, norms = (torch.linalg.vector_norm(t, dim=1, dtype=F64).cpu() for t in (left, rows))
        return left, torch.where(norms > 0, sizes / norms.clamp(min=torch.finfo(F64).tiny), sizes)

    def _refusal(self, found: InverseSolution) -> NotSolvedError:
        at = int(found.residual_norms.nan_to_num(nan=torch.inf).argmax())
        return NotSolvedError(
            f"{int((~found.converged).sum())} of {len(found.converged)} systems with A + damping I are not solved to "
            f"rtol={self.rtol:g}: a relative residual is {float(found.residual_norms[at]):.2g} "
            f"({found.statuses[at].message}). If the matrix is singular or nearly so raise damping (now "
            f"{self.damping:g}); if products' rounding is in the way raise rtol or use float64; or pass a "
            "preconditioner or more max_iterations. solve(b) returns what was found, with its residuals."
        )


class EntryByEntry(DirectSolver):
    """A diagonal matrix, (n,); entries that are zero have no inverse, and what they leave shows in the residual."""

    def __init__(self, diagonal: Tensor) -> None:
        self._inverses = torch.where(diagonal != 0, 1 / diagonal, 0.0)
        self._status = KrylovStatus.CONVERGED if bool((diagonal != 0).all()) else KrylovStatus.LEAST_SQUARES
        if not bool(torch.isfinite(diagonal).all()):
            self._status = KrylovStatus.NON_FINITE

    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        return rows * self._inverses, [self._status] * len(rows)


class InEigenvectors(DirectSolver):
    """V diag(θ) Vᵀ + λI, V (n, k) with orthonormal columns; what lies outside of them is divided by λ."""

    def __init__(self, vectors: Tensor, values: Tensor, damping: float) -> None:
        self._vectors, self._rest = vectors, 1 / damping if damping > 0 else 0.0
        shifted = values + damping
        level = torch.finfo(vectors.dtype).eps * float(shifted.abs().max()) if len(values) else 0.0
        # What has no inverse is left out, and what that leaves unsolved shows in the residual.
        self._inverses = torch.where(shifted.abs() > level, 1 / shifted, 0.0)

    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        inside = rows @ self._vectors
        outside = rows - inside @ self._vectors.mT
        return (inside * self._inverses) @ self._vectors.mT + outside * self._rest, [KrylovStatus.CONVERGED] * len(rows)


class _Decomposed(DirectSolver):
    """A small symmetric matrix by its eigenvalues, float64.

    Args:
        matrix: A, or JJᵀ; (size, size).
        damping: λ.
        wide: J, if the matrix is JJᵀ.
        dtype: of the products that the matrix is made of.
    """

    def __init__(self, matrix: Tensor, damping: float, wide: LinearOperator | None, dtype: torch.dtype) -> None:
        self._damping, self._wide, self.size = damping, wide, len(matrix)
        self._finite = bool(torch.isfinite(matrix).all())
        if not self._finite:
            return
        values, self._vectors = torch.linalg.eigh(symmetric_part(matrix, dtype))
        shifted = values + damping
        # Eigenvalues that are rounding have no inverse; what they leave unsolved shows in the residual. The root is for
        # half precision, where as many units as there are rows would be all eigenvalues.
        eps = torch.finfo(dtype).eps
        regular = shifted.abs() > min(len(matrix) * eps, eps**0.5) * float(shifted.abs().max())
        self._inverses = torch.where(regular, 1 / shifted, 0.0)
        self._singular = not bool(regular.all())

    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        if not self._finite:
            return torch.full_like(rows, torch.nan), [KrylovStatus.NON_FINITE] * len(rows)
        status = KrylovStatus.LEAST_SQUARES if self._singular else KrylovStatus.CONVERGED
        if self._wide is None:
            return self._apply(rows.to(F64)).to(rows), [status] * len(rows)
        inner = self._apply(self._wide.matmat(rows.mT).mT.to(F64)).to(rows)
        return (rows - self._wide.rmatmat(inner.mT).mT) / self._damping, [status] * len(rows)

    def _apply(self, rows: Tensor) -> Tensor:
        return ((rows @ self._vectors) * self._inverses) @ self._vectors.mT
