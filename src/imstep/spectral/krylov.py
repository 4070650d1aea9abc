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

_ROUNDED = 0.1
"""Times the rounding error of the dtype: how far vectors may be from orthogonal."""


class KrylovSpace:
    """Orthonormal vectors V, the rows of a matrix, with T = V A Vᵀ, and a unit vector u to go on with.

        A Vᵀ = Vᵀ T + u cᵀ,   u orthogonal to V

    Args:
        operator: A, self-adjoint, of size n.
        capacity: largest number of vectors in V, in [2, n).
        generator: draws start vectors.

    Attributes:
        size: the number m of vectors in V.
        products: with A.
        scale: the largest magnitude of a Ritz value so far, which ‖A‖ is at least.
        broken: whether a product was not finite; the space is the one before.
    """

    def __init__(self, operator: LinearOperator, capacity: int, generator: torch.Generator) -> None:
        self._operator, self._generator = operator, generator
        self._basis = no_rows(operator).new_empty(capacity, operator.size)
        self._projected = torch.zeros(capacity, capacity, dtype=F64)
        self._ahead = no_rows(operator).new_empty(operator.size)  # u
        self._couplings = torch.zeros(0, dtype=F64)  # c
        self.size, self.products, self.scale, self.broken = 0, 0, 0.0, False
        self._lost = 0.0  # largest entries of c that were left out
        self._begin_randomly()

    @property
    def dimension(self) -> int:
        """n."""
        return self._basis.shape[1]

    @property
    def capacity(self) -> int:
        """The largest number of vectors in V."""
        return len(self._projected)

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.size == self.capacity

    def expand(self) -> None:
        """u becomes a vector of V, by one product; what the product adds is the next u."""
        m = self.size
        self._basis[m] = self._ahead
        image = self._operator.matvec(self._basis[m])
        self.products += 1
        # What symmetry foretells, of a few vectors as a rule, is taken away first: then one pass over all will do.
        foretold = torch.cat([self._couplings, inner(image[None], self._basis[m, None])[0].cpu()])
        # In memory that is there: fresh memory of this size takes as long as three passes.
        rest = self._ahead.copy_(image)
        for at in foretold.nonzero()[:, 0].tolist():
            rest.sub_(self._basis[at], alpha=float(foretold[at]))
        found, norm = self._take_away(rest, m + 1)
        column = foretold + found
        if not math.isfinite(norm) or not bool(torch.isfinite(found).all()):
            self.broken = True
            return
        self.scale = max(self.scale, abs(float(column[-1])))
        self._check_symmetry(column[:m], self._couplings, norm)
        self._projected[: m + 1, m] = self._projected[m, : m + 1] = column
        self.size = m + 1
        # What is left of the product is rounding: the space is invariant, and another one begins.
        if norm <= 10 * torch.finfo(rest.dtype).eps * (float(column.norm()) + self.scale):
            self._begin_randomly()
            return
        rest.div_(norm)
        self._couplings = torch.zeros(m + 1, dtype=F64)
        self._couplings[m] = norm

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,) in ascending order, their coordinates (m, m) and residual norms (m,), float64."""
        values, coordinates = torch.linalg.eigh(self._projected[: self.size, : self.size])
        self.scale = max(self.scale, float(values.abs().max()))
        return values, coordinates, (self._couplings @ coordinates).abs()

    def tail(self, steps: int) -> tuple[Tensor, Tensor, float]:
        """Of the last ``steps`` vectors, a Lanczos process of their own: Ritz values, coordinates, the sum of log β."""
        at = self.size - steps
        projected = self._projected[at : self.size, at : self.size]
        betas = torch.cat([projected.diagonal(1), self._couplings[-1:]])
        return *torch.linalg.eigh(projected), float(betas.abs().log().sum())

    def restart(self, values: Tensor, coordinates: Tensor) -> None:
        """Shrink to some Ritz vectors, a stretch at a time: without a copy of the whole; and go on where the space was.

        Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), 602-616: thick restart.
        """
        weights, kept = coordinates.mT.to(self._basis), len(values)
        for stretch in own_entries(self._basis).split(2**16, dim=1):
            stretch[:kept] = weights @ stretch[: self.size]
        self._projected.zero_()
        self._projected[:kept, :kept] = torch.diag(values)
        self._couplings = self._couplings @ coordinates
        self.size = kept

    def begin_anew(self) -> None:
        """Go on from a random vector orthogonal to V, as if A Vᵀ were Vᵀ T.

        Its Krylov space is one of A on the orthogonal complement of V. There an eigenvector of A has its eigenvalue
        still, if products with it have not led to V: another one of an eigenvalue that V knows.
        """
        self._lost += float(self._couplings.abs().max())
        self._begin_randomly()

    def go_on_from(self, coordinates: Tensor, kept: int) -> None:
        """Of V keep the first, and go on from a combination of the last, by its coordinates."""
        last = self._basis[self.size - len(coordinates) : self.size]
        torch.mv(own_entries(last).mT, coordinates.to(last), out=own_entries(self._ahead))
        self._couplings, self.size = torch.zeros(kept, dtype=F64), kept

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Combinations (l, n) of V, by their coordinates (m, l)."""
        return coordinates.mT.to(self._basis) @ self._basis[: self.size]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as tensors and numbers."""
        return {
            "basis": in_whole(self._basis[: self.size].clone()),
            "ahead": in_whole(self._ahead.clone()),
            "projected": self._projected.clone(),
            "couplings": self._couplings.clone(),
            "generator": self._generator.get_state(),
            "size": self.size,
            "products": self.products,
            "numbers": [self.scale, self._lost],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state is of a space of another size, or of an earlier version.
        """
        if "ahead" not in state or state["ahead"].dim() != 1:
            raise ValueError("the state was saved by an earlier version of imstep. Begin anew, without resume.")
        basis, projected = state["basis"], state["projected"]
        if basis.shape[1] != self._basis.shape[1] or projected.shape != self._projected.shape:
            raise ValueError(
                f"the state is of vectors of size {basis.shape[1]}, up to {len(projected)} of them, the solve of size "
                f"{self._basis.shape[1]}, up to {len(self._projected)}. Resume with the operator and k of the start."
            )
        self._basis[: len(basis)] = self._operator.held(basis.to(self._basis))
        self._ahead.copy_(self._operator.held(state["ahead"].to(self._basis)))
        self._projected, self._couplings = projected.clone(), state["couplings"].clone()
        self.size, self.products = state["size"], state["products"]
        self.scale, self._lost = state["numbers"]
        self._generator.set_state(state["generator"].cpu())

    def _take_away(self, vector: Tensor, count: int) -> tuple[Tensor, float]:
        """Make a vector orthogonal to the first ``count`` of V; its coordinates in them, the norm of what is left."""
        row, known = vector[None], self._basis[:count]
        before, total = float(norms(row)), torch.zeros(count, dtype=F64)
        for _ in range(2):
            coordinates = inner(row, known)
            found = coordinates[0].cpu()
            # A part as small may stay, which saves a pass over V. Residuals are as the recurrence says all the same.
            if not bool((found.abs() > _ROUNDED * torch.finfo(vector.dtype).eps * before).any()):
                return total, before
            own_entries(row).addmm_(coordinates.to(row), own_entries(known), alpha=-1)
            total, norm = total + found, float(norms(row))
            # Where much was taken away, what is left holds the rounding of it: once more (Parlett, section 6.9).
            if norm > 0.7 * before:
                break
            before = norm
        return total, norm

    def _begin_randomly(self) -> None:
        """Another u: random, orthogonal to V."""
        drawn = torch.randn(
            self.dimension, generator=self._generator, device=self._generator.device, dtype=self._basis.dtype
        )
        self._ahead.copy_(self._operator.held(drawn.to(self._basis.device)))
        _, norm = self._take_away(self._ahead, self.size)
        self._ahead.div_(norm)
        self._couplings = torch.zeros(self.size, dtype=F64)

    def _check_symmetry(self, column: Tensor, foretold: Tensor, norm: float) -> None:
        """Raise where vᵀ(A w) is not wᵀ(A v)."""
        if len(column) == 0:
            return
        size = max(self.scale, norm, float(column.abs().max()))
        difference = float((column - foretold).abs().max())
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
