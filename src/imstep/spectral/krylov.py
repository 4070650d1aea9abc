"""A Krylov space that is restarted with its best vectors: the engine behind `eigenpairs`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.sharded import in_whole, own_entries
from imstep.linalg.symmetry import asymmetric, tolerance
from imstep.spectral.probes import images, inner, no_rows, norms, orthonormal

F64 = torch.float64


class KrylovSpace:
    """Orthonormal vectors V, the rows of a matrix, with T = V A Vᵀ.

        A Vᵀ = Vᵀ T + β v eᵀ,   v the next vector, orthogonal to V

    but for the residuals of vectors that were taken as found when a random one was begun with.

    Args:
        operator: A, self-adjoint, of size n.
        capacity: largest number of vectors, in [2, n).
        generator: draws start vectors.

    Attributes:
        size: the number m of vectors.
        products: with A.
        scale: the largest magnitude of a Ritz value so far, which ‖A‖ is at least.
        broken: whether a product was not finite; the space is the one before.
    """

    def __init__(self, operator: LinearOperator, capacity: int, generator: torch.Generator) -> None:
        self._operator, self._generator = operator, generator
        self._basis = no_rows(operator).new_empty(capacity + 1, operator.size)
        self._projected = torch.zeros(capacity, capacity, dtype=F64)
        self.size, self.products, self.scale, self.broken = 0, 0, 0.0, False
        self._beta, self._lost = 0.0, 0.0
        self._couplings = torch.zeros(0, dtype=F64)  # of the next vector with V, by symmetry
        self._begin_randomly()

    @property
    def dimension(self) -> int:
        """n."""
        return self._basis.shape[1]

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.size == len(self._projected)

    def expand(self) -> None:
        """One vector more, by one product."""
        m = self.size
        image, column, norm = self._following(self._operator.matvec(self._basis[m]))
        self.products += 1
        if not math.isfinite(norm) or not bool(torch.isfinite(column).all()):
            self.broken = True
            return
        self.scale = max(self.scale, abs(float(column[-1])))
        self._check_symmetry(column[:m], norm)
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self.size = m + 1
        # What is left of the product is rounding: the space is invariant, and another one begins.
        if norm <= 10 * torch.finfo(image.dtype).eps * (float(column.norm()) + self.scale):
            self._begin_randomly()
            return
        self._beta = norm
        self._basis[m + 1] = image / norm
        self._couplings = torch.zeros(m + 1, dtype=F64)
        self._couplings[m] = norm

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,) in ascending order, their coordinates (m, m) and residual norms (m,), float64."""
        values, coordinates = torch.linalg.eigh(self._projected[: self.size, : self.size])
        self.scale = max(self.scale, float(values.abs().max()))
        return values, coordinates, self._beta * coordinates[-1].abs()

    def restart(self, values: Tensor, coordinates: Tensor) -> None:
        """Shrink to some Ritz vectors, and go on where the space was.

        Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), 602-616: thick restart.
        """
        following = self._basis[self.size].clone()
        self._couplings = self._beta * coordinates[-1]
        self._shrink(values, coordinates)
        self._basis[self.size] = following

    def begin_anew(self, values: Tensor, coordinates: Tensor) -> None:
        """Shrink to some Ritz vectors, take them as found, and go on from a random vector orthogonal to them."""
        self._lost += self._beta * float(coordinates[-1].abs().max())
        self._shrink(values, coordinates)
        self._begin_randomly()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Combinations (l, n) of V, by their coordinates (m, l)."""
        return coordinates.mT.to(self._basis) @ self._basis[: self.size]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as tensors and numbers."""
        return {
            "basis": in_whole(self._basis[: self.size + 1].clone()),
            "projected": self._projected.clone(),
            "couplings": self._couplings.clone(),
            "generator": self._generator.get_state(),
            "size": self.size,
            "products": self.products,
            "numbers": [self.scale, self._beta, self._lost],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state is of a space of another size.
        """
        basis, projected = state["basis"], state["projected"]
        if basis.shape[1] != self._basis.shape[1] or projected.shape != self._projected.shape:
            raise ValueError(
                f"the state is of vectors of size {basis.shape[1]}, up to {len(projected)} of them, the solve of size "
                f"{self._basis.shape[1]}, up to {len(self._projected)}. Resume with the operator and k of the start."
            )
        self._basis[: len(basis)] = self._operator.held(basis.to(self._basis))
        self._projected, self._couplings = projected.clone(), state["couplings"].clone()
        self.size, self.products = state["size"], state["products"]
        self.scale, self._beta, self._lost = state["numbers"]
        self._generator.set_state(state["generator"].cpu())

    def _shrink(self, values: Tensor, coordinates: Tensor) -> None:
        """V becomes combinations of itself, a stretch at a time: without a copy of the whole."""
        weights, kept = coordinates.mT.to(self._basis), len(values)
        for stretch in own_entries(self._basis).split(2**16, dim=1):
            stretch[:kept] = weights @ stretch[: self.size]
        self._projected.zero_()
        self._projected[:kept, :kept] = torch.diag(values)
        self.size = kept

    def _following(self, image: Tensor) -> tuple[Tensor, Tensor, float]:
        """The part of A v orthogonal to V and v, its coordinates in them (m + 1,), and its norm.

        What symmetry foretells, of a few vectors as a rule, is taken away first: then one pass over all will do.
        """
        foretold = torch.cat([self._couplings, inner(image[None], self._basis[self.size, None])[0].cpu()])
        rest = image.clone()
        for at in foretold.nonzero()[:, 0].tolist():
            rest.sub_(self._basis[at], alpha=float(foretold[at]))
        rest, column, norm = self._outside(rest, self.size + 1)
        return rest, foretold + column, norm

    def _outside(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
        """The part of a vector orthogonal to the first ``count`` ones, its coordinates in them, and its norm."""
        known, rows = self._basis[:count], vector[None]
        before, coordinates = float(norms(rows)), inner(rows, known)
        rows = rows.addmm(coordinates.to(rows), known, alpha=-1)
        norm = float(norms(rows))
        # Where much was taken away, what is left holds the rounding of it: once more (Parlett, section 6.9).
        if not norm > 0.7 * before:
            again = inner(rows, known)
            rows, coordinates = rows.addmm(again.to(rows), known, alpha=-1), coordinates + again
            norm = float(norms(rows))
        return rows[0], coordinates[0].cpu(), norm

    def _begin_randomly(self) -> None:
        """The next vector is random, orthogonal to V, and no product has led to it."""
        drawn = torch.randn(
            self._basis.shape[1], generator=self._generator, device=self._generator.device, dtype=self._basis.dtype
        )
        vector, _, norm = self._outside(self._operator.held(drawn.to(self._basis.device)), self.size)
        self._basis[self.size] = vector / norm
        self._beta, self._couplings = 0.0, torch.zeros(self.size, dtype=F64)

    def _check_symmetry(self, column: Tensor, norm: float) -> None:
        """Raise where vᵀ(A w) is not wᵀ(A v)."""
        if len(column) == 0:
            return
        size = max(self.scale, norm, float(column.abs().max()))
        difference = float((column - self._couplings).abs().max())
        if difference > tolerance(self._basis.dtype) * size + self._lost:
            raise asymmetric(difference / size)


@dataclass(frozen=True, eq=False)
class Certified:
    """Ritz pairs with residuals that were computed from the vectors: values θ (k,), vectors and A y, rows (k, n)."""

    values: Tensor
    vectors: Tensor
    images: Tensor

    @property
    def residuals(self) -> Tensor:
        """A y - θ y, (k, n)."""
        return self.images - self.values.to(self.vectors)[:, None] * self.vectors


def certified(
    operator: LinearOperator, rows: Tensor, key: Callable[[Tensor], Tensor], level: float
) -> tuple[Certified, Tensor, int]:
    """Ritz pairs in the span of rows (k, n), the most wanted first; their residual norms (k,); the products spent.

    Where rounding has left residuals above the level, once more in the span of rows and residuals: that takes most of
    the rounding away, which is spread over all eigenvectors alike.
    """
    count = len(rows)
    found = _rayleigh_ritz(rows, images(operator, rows), key, count)
    residuals, spent = found.residuals, count
    sizes = norms(residuals)
    if float(sizes.max()) > level:
        more = orthonormal(residuals, found.vectors)
        made = torch.cat([found.images, images(operator, more)])
        better = _rayleigh_ritz(torch.cat([found.vectors, more]), made, key, count)
        spent += len(more)
        improved = norms(better.residuals)
        if float(improved.max()) < float(sizes.max()):
            found, sizes = better, improved
    return found, sizes.cpu(), spent


def _rayleigh_ritz(rows: Tensor, made: Tensor, key: Callable[[Tensor], Tensor], count: int) -> Certified:
    """The ``count`` most wanted Ritz pairs in the span of rows, whose products were made."""
    factor = torch.linalg.cholesky(inner(rows, rows))
    half = torch.linalg.solve_triangular(factor, inner(rows, made), upper=False)
    reduced = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, rotation = torch.linalg.eigh((reduced + reduced.mT) / 2)
    order = key(values).argsort(descending=True, stable=True)[:count]
    weights = torch.linalg.solve_triangular(factor.mT, rotation[:, order], upper=True).mT.to(rows)
    return Certified(values[order].cpu(), weights @ rows, weights @ made)
