"""A growing orthonormal basis with its products: the space in which a small problem stands for a large one."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.dots import norm_in_range
from imstep.linalg.operator import LinearOperator


class Subspace:
    """Orthonormal vectors V with A V and VᵀAV; the vectors are the rows of `basis`.

    Args:
        operator: A, self-adjoint.
        capacity: largest number of vectors, >= 1.
    """

    def __init__(self, operator: LinearOperator, capacity: int) -> None:
        self._operator, self._capacity = operator, capacity
        empty = operator.held(torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device))
        self._basis, self._images, self.size = empty, empty, 0
        self.projected = torch.empty(0, 0, dtype=torch.float64)
        self.products = 0

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.size == self._capacity

    @property
    def basis(self) -> Tensor:
        """V, (k, n)."""
        return self._basis[: self.size]

    @property
    def images(self) -> Tensor:
        """A V, (k, n)."""
        return self._images[: self.size]

    def direction(self, vector: Tensor) -> Tensor | None:
        """The part of a vector that is orthogonal to the space, normalised; None if it is rounding only."""
        norm = norm_in_range(vector)
        for _ in range(2):
            vector = vector - self.basis.mT @ (self.basis @ vector)
        rest = norm_in_range(vector)
        if not rest > 10 * torch.finfo(vector.dtype).eps * norm:
            return None
        return vector / rest

    def add(self, direction: Tensor) -> bool:
        """Take a unit vector orthogonal to the space in: one product. False, and nothing taken, if it is not finite."""
        image = self._operator.matvec(direction)
        self.products += 1
        self._reserve()
        self._basis[self.size], self._images[self.size] = direction, image
        k = self.size + 1
        column = (self._basis[:k] @ image).double().cpu()
        if not bool(torch.isfinite(column).all() and torch.isfinite(image).all()):
            return False
        grown = torch.empty(k, k, dtype=torch.float64)
        grown[:-1, :-1], grown[-1], grown[:, -1] = self.projected, column, column
        self.projected, self.size = grown, k
        return True

    def combined(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """V h and A V h for coordinates h, (k,)."""
        weights = coordinates.to(self._basis)
        return self.basis.mT @ weights, self.images.mT @ weights

    def restart(self, coordinates: Tensor) -> Tensor:
        """Shrink to the span of combinations of V, (k, j), without a product; returns the new basis in terms of V."""
        kept = torch.linalg.qr(coordinates)[0]
        projected = kept.mT @ self.projected @ kept
        self.projected = (projected + projected.mT) / 2
        weights = kept.mT.to(self._basis)
        basis, images = weights @ self.basis, weights @ self.images
        self.size = kept.shape[1]
        self._basis[: self.size], self._images[: self.size] = basis, images
        return kept

    def _reserve(self) -> None:
        """Room for one vector more: memory grows with the basis, by doubling."""
        if self.size == len(self._basis):
            more = self._basis.new_empty(min(max(8, self.size), self._capacity - self.size), self._basis.shape[1])
            self._basis, self._images = torch.cat([self._basis, more]), torch.cat([self._images, more])
