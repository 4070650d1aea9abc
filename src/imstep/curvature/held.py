"""Entries of the parameters that a step on a batch leaves where they are."""

from __future__ import annotations

from torch import Tensor

from imstep.curvature.hooks import mask_of
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch


def free_entries(frozen: FrozenBatch, parameters: ParameterVector) -> Tensor | None:
    """Zeros for the entries (n,) that are held fixed, ones for the others; None where all are free.

    Held are what hooks mask, and, as in PyTorch, parameters without a gradient, whatever earlier steps know of them.

    Args:
        frozen: a batch that has been evaluated.
        parameters: the vector.
    """
    hooks = None if frozen.hook_factors is None else mask_of(frozen.hook_factors)
    if all(frozen.used):
        return hooks
    used = parameters.spread([float(is_used) for is_used in frozen.used])
    return used if hooks is None else used * hooks
