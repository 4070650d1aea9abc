"""Third derivatives of a closure along directions."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.complexstep import Arithmetic
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch
from imstep.curvature.shared import SharedBatch


def derivatives_along(
    frozen: FrozenBatch, parameters: ParameterVector, direction: Tensor
) -> tuple[float, float]:
    """dᵀHd and its derivative along d, D³f[d, d, d], at the current parameters, for d = ``direction`` (n,).

    Cost: one evaluation on nested numbers, 25/3 gradients in matrix products.
    """
    product, third = _bent_product(frozen, parameters, direction, direction)
    return float(product @ direction), float(third @ direction)


def third_derivative_along(
    frozen: FrozenBatch, parameters: ParameterVector, first: Tensor, second: Tensor
) -> Tensor:
    """D³f[u, v, ·], (n,), at the current parameters, for u = ``first`` and v = ``second``, (n,); costs the same."""
    return _bent_product(frozen, parameters, first, second)[1]


def _bent_product(
    frozen: FrozenBatch, parameters: ParameterVector, first: Tensor, second: Tensor
) -> tuple[Tensor, ...]:
    """H u and its derivative along v."""
    if isinstance(frozen, SharedBatch):  # what is summed over processes are plain numbers
        whole = parameters.evaluated, parameters.whole(first), parameters.whole(second)
        product, third = frozen.total(lambda own: _bent_product(own, *whole), 0, 2)[1]
        apart = frozen.penalty_apart
        return product if apart is None else torch.addcmul(product, apart.factors, first), third
    arithmetic = Arithmetic()
    for p, d in zip(parameters.tensors, parameters.unflatten(second), strict=True):
        arithmetic.attach(p, d)
    try:
        with arithmetic:
            product = frozen.product(first)
    finally:
        for p in parameters.tensors:
            arithmetic.release(p)
    return product, arithmetic.value(product).imaginary
