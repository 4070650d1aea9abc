"""The third derivative of a closure along a direction."""

from __future__ import annotations

from torch import Tensor

from imstep.complexstep import Arithmetic
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector


def third_derivative_along(frozen: FrozenClosure, parameters: ParameterVector, direction: Tensor) -> float:
    """D³f[d, d, d] at the current parameters, for d = ``direction`` (n,): the derivative along d of dᵀH d.

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
    return float(arithmetic.value(product).imaginary @ direction)
