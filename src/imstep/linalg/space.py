"""What the entries of an operator's vectors stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from imstep.linalg.fitting import Matrix


class Space(Protocol):
    """Between vectors (n,) and lists of tensors, such as a model's parameters."""

    def checked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors, if they have the shapes of the list."""

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The vector (n,) of a list."""

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """The list of a vector (n,)."""

    def places(self, by: str) -> dict[str, Tensor]:
        """Entries of the vector (k,), by the name of the layer or parameter that they belong to."""


def known(space: Space | None, operator: Matrix) -> Space:
    """The space, if it is known what the operator's vectors stand for."""
    if space is None:
        raise ValueError(
            f"layers, parameters and lists of tensors need an operator that belongs to a model, and "
            f"{type(operator).__name__} is none. Pass a Hessian, Gauss-Newton or Fisher matrix, or what is made of one "
            "by sums, multiples, products and inverses; or use flat vectors, and cut out blocks with "
            "A.submatrix(index)."
        )
    return space
