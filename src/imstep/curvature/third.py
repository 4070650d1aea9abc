"""Derivatives of a closure along a direction, up to the third."""

from __future__ import annotations

from torch import Tensor

from imstep.complexstep import Arithmetic
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch


def derivatives_along(
    frozen: FrozenBatch, parameters: ParameterVector, direction: Tensor
) -> tuple[float, float]:
    """dᵀHd and its derivative along d, D³f[d, d, d], at the current parameters, for d = ``direction`` (n,).

    Cost: one evaluation on nested numbers, 25/3 gradients in matrix products.
    """
    arithmetic = Arithmetic()
    for p, d in zip(parameters.tensors, parameters.unflatten(direction), strict=True):
        arithmetic.attach(p, d)
    try:
        with arithmetic:
            product = frozen.product(direction)
    finally:
        for p in parameters.tensors:
            arithmetic.release(p)
    return float(product @ direction), float(arithmetic.value(product).imaginary @ direction)
