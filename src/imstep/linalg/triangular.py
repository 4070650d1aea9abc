"""Damped least squares by a triangular factor of a Jacobian that is met in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from imstep.linalg.reduced import DampedLeastSquares


class BlockQR:
    """J = Q R by Householder's reflections, block of rows after block: R of the first, then of R over the next, ...

    Args:
        blocks: rows of J from above, (m, n) each, the first with m >= n; float64, finite. None is kept.

    Attributes:
        triangle: R, (n, n).

    Cost: 2 N n² operations, and as many as for n rows more with each block after the first; as many numbers as these
        rows have.

    Source: Demmel, Grigori, Hoemmen and Langou, SIAM J. Sci. Comput. 34 (2012), A206-A239, sequential TSQR.
    """

    def __init__(self, blocks: Iterable[Tensor]) -> None:
        self._reflections: list[tuple[Tensor, Tensor]] = []
        above: list[Tensor] = []
        for block in blocks:
            made = torch.geqrf(torch.cat([*above, block]))
            self._reflections.append((made.a, made.tau))
            above = [made.a[: block.shape[1]].triu()]
        (self.triangle,) = above

    def project(self, vector: Tensor) -> Tensor:
        """Qᵀ v, (n,) of (N,)."""
        size, above, start = len(self.triangle), vector[:0, None], 0
        for a, tau in self._reflections:
            end = start + len(a) - len(above)
            above = torch.ormqr(a, tau, torch.cat([above, vector[start:end, None]]), transpose=True)[:size]
            start = end
        return above[:, 0]

    def lift(self, vector: Tensor) -> Tensor:
        """Q v, (N,) of (n,)."""
        pieces, size = [], len(vector)
        above = vector[:, None]
        for a, tau in reversed(self._reflections):
            whole = torch.ormqr(a, tau, torch.cat([above, above.new_zeros(len(a) - size, 1)]))
            above = whole[:size]
            pieces.append(whole[size:])
        return torch.cat([above, *reversed(pieces)])[:, 0]


_PANEL = 64
"""Columns that are taken at a time; of 32 to 128 the fastest, for 257 columns and for 1,365."""


class DampedQR:
    """[R; √λ I] = Q R' for a triangle R, by Householder's reflections that leave out what is zero.

    Columns are taken in panels from the left. Of √λ I a panel meets only the rows that it or one before it has reached.

    Args:
        triangle: R, (n, n), upper.
        root: √λ.

    Attributes:
        triangle: R', (n, n).

    Cost: about 4 n³/3 operations, where QR factors of the whole take 10 n³/3; n² numbers.

    Source: of such a matrix column by column, Moré, "The Levenberg-Marquardt algorithm" (1978), section 3; the panels
        are ours.
    """

    def __init__(self, triangle: Tensor, root: float) -> None:
        size = len(triangle)
        # Transposed, so that what LAPACK takes by columns lies as it wants it.
        upper, lower = triangle.mT.clone(memory_format=torch.contiguous_format), triangle.new_zeros(size, size)
        lower.diagonal().fill_(root)
        self._panels: list[tuple[int, int, Tensor, Tensor]] = []
        for start in range(0, size, _PANEL):
            end = min(start + _PANEL, size)
            both = torch.cat([upper[start:, start:end], lower[start:, :end]], 1).mT
            a, tau = torch.geqrf(both[:, : end - start])
            upper[start:end, start:end] = a[: end - start].triu().mT
            self._panels.append((start, end, a, tau))
            if end < size:
                rest = torch.ormqr(a, tau, both[:, end - start :], transpose=True).mT
                upper[end:, start:end], lower[end:, :end] = rest[:, : end - start], rest[:, end - start :]
        self.triangle = upper.mT

    def project(self, above: Tensor, below: Tensor) -> Tensor:
        """Qᵀ [a; b], (n,) of (n,) and (n,)."""
        above, below = above[:, None].clone(), below[:, None].clone()
        for start, end, a, tau in self._panels:
            both = torch.ormqr(a, tau, torch.cat([above[start:end], below[:end]]), transpose=True)
            above[start:end], below[:end] = both[: end - start], both[end - start :]
        return above[:, 0]


class TriangularLeastSquares(DampedLeastSquares):
    """Damped least squares from J = Q R, whose coordinates are the entries of d.

        [R; √λ I] = Q' R',   u' = -R'⁻¹ Q'ᵀ [Qᵀρ; √λ u]

    Neither JJᵀ nor JᵀJ, which have the square of J's condition, is formed. One factorisation of J serves all λ; each λ
    takes another of R.

    Args:
        qr: of J, N >= n.

    Cost: 4 n³/3 operations for each new λ, by :class:`DampedQR`, 4 N n for each ρ.

    Source: Golub and Van Loan, Matrix Computations (2013), section 6.1.4.

    Example:
        >>> J = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        >>> problem = TriangularLeastSquares(BlockQR([J]))
        >>> problem.solve(torch.tensor([3.0, 2.0, 5.0]).double(), torch.zeros(2).double(), 1.0)
        tensor([-0.9000, -1.0000], dtype=torch.float64)
    """

    kind = "triangular"

    def __init__(self, qr: BlockQR) -> None:
        self._qr = qr
        super().__init__(len(qr.triangle))
        self._free = qr.triangle.any(0)  # an entry that nothing depends on stays where it is
        self._damping, self._damped = -1.0, DampedQR(qr.triangle[:0, :0], 0.0)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        damped = self._factor(damping)
        right = damped.project(self._qr.project(residuals), damping**0.5 * coordinates)[:, None]
        return -torch.linalg.solve_triangular(damped.triangle, right, upper=True)[:, 0] * self._free

    def image(self, coordinates: Tensor) -> Tensor:
        return self._qr.lift(self._qr.triangle @ coordinates)

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        upper = self._factor(damping).triangle
        return float(torch.linalg.solve_triangular(upper.mT, gradient[:, None], upper=False).norm())

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return coordinates

    def _factor(self, damping: float) -> DampedQR:
        """That of the last λ is kept."""
        if damping != self._damping:
            self._damping, self._damped = damping, DampedQR(self._qr.triangle, damping**0.5)
        return self._damped
