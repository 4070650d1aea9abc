"""A matrix in units that leave room for squares."""

from __future__ import annotations

import math

from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.dots import norm_in_range
from imstep.linalg.space import Space

_FAR = 200
"""Exponent of two up to which squares, products and sums of numbers stay within the range of float64."""


class InUnits(LinearOperator):
    """A / unit, with a power of two which the first product that is not zero tells; 1 unless A is very large or small.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A = InUnits(DiagonalOperator(torch.tensor([1e-300, 3e-300], dtype=torch.float64)))
        >>> product = A @ torch.ones(2, dtype=torch.float64)
        >>> float(product[1]) > 0.1, A.unit * product
        (True, tensor([1.0000e-300, 3.0000e-300], dtype=torch.float64))
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device)
        self._operator, self._unit = operator, 0.0

    @property
    def unit(self) -> float:
        """What products are divided by."""
        return self._unit or 1.0

    @unit.setter
    def unit(self, unit: float) -> None:
        self._unit = unit

    def matvec(self, vector: Tensor) -> Tensor:
        return self._divided(self._operator.matvec(vector), vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self._divided(self._operator.matmat(block), block)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._divided(self._operator.rmatvec(vector), vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self._divided(self._operator.rmatmat(block), block)

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self._operator.spaces

    def held(self, vector: Tensor) -> Tensor:
        return self._operator.held(vector)

    def _divided(self, product: Tensor, vectors: Tensor) -> Tensor:
        if not self._unit and product.numel():
            size = norm_in_range(product) / (norm_in_range(vectors) or 1.0)
            exponent = math.frexp(size)[1] if math.isfinite(size) else 0
            # Powers beyond 1022 are no normal numbers, and have no reciprocal.
            within = 1.0 if abs(exponent) < _FAR else 2.0 ** max(-1022, min(exponent, 1022))
            self._unit = within if size > 0 else 0.0
        return product if self.unit == 1 else product / self._unit
