"""Whether a closure is a function of the parameters: whether it has the same loss when it is called again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from imstep.linalg.precision import coarsest_eps


def require_function(first: float, evaluate: Callable[[bool], float], tensors: Iterable[Tensor]) -> None:
    """Raise where further evaluations at the same parameters have other losses.

    Evaluations that are recorded have simpler operators in place of some kernels, such as those of recurrent networks.
    Then losses of both kinds are apart by what these make of them, much where all that is left of a loss is rounding,
    but those of one kind are the same each time.

    Args:
        first: the loss of an evaluation.
        evaluate: makes another one of the same parameters, recorded or not; called with False, and where the loss is
            apart, with both.
        tensors: a loss and the parameters, of whose dtypes the coarsest is the losses' precision.

    Raises:
        ValueError: the losses are apart.
    """
    again, rounding = evaluate(False), math.sqrt(coarsest_eps(tensors))
    same = lambda a, b: _apart(a, b) <= rounding
    if not (same(first, again) or (same(again, evaluate(False)) and same(first, evaluate(True)))):
        raise ValueError(_ANOTHER.format(first, again))


def require_unchanged(first: Tensor, now: Tensor) -> None:
    """Raise where an evaluation for a product does not come to what the first one came to, a loss or outputs.

    Raises:
        RuntimeError: both are finite, and apart by more than rounding.
    """
    if first.shape == now.shape:
        rounding = math.sqrt(torch.finfo(first.dtype).eps)
        apart, size = float((now - first).detach().norm()), float(first.detach().norm())
        if not rounding * size + sys.float_info.min < apart < math.inf:
            return
    raise RuntimeError(_CHANGED)


def _apart(a: float, b: float) -> float:
    """How far numbers are apart, as a share of the larger one; 0 if one of them is not finite."""
    apart = abs(a - b) / max(abs(a), abs(b), sys.float_info.min)
    return apart if math.isfinite(apart) else 0.0


_CHANGED = (
    "the closure is another function than when the operator was built: it was called again for a product, and came to "
    "another value. The model was switched between train() and eval(), say, or a variable that the closure looks up, "
    "such as its batch, is another one now. Bind variables to the closure, as functools.partial does, and leave the "
    "model as it is while there are products to make; or raise memory_budget, so that a record is kept."
)

_ANOTHER = (
    "closure has the loss {:.6g} when it is called first, and {:.6g} when it is called again at the same parameters: "
    "it takes another batch each time, draws from np.random.default_rng() or the like, or counts its calls. All "
    "evaluations of a step are of one function. Fetch the batch, and draw and count, before the step; generators of "
    "PyTorch, the global ones of Python and NumPy, and buffers of the model are put back between evaluations."
)
