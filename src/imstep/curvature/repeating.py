"""Whether a closure is a function of the parameters: whether it has the same loss when it is called again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

_LOW = 0.05  # what bfloat16 and the like may make of a loss


def require_function(first: float, evaluate: Callable[[], float], eps: float) -> None:
    """Raise where further evaluations at the same parameters have other losses.

    Kernels of less precision than the loss, in whose place a record has simpler operators, such as fused recurrent
    networks under autocast, may come to another loss than the first evaluation, but come to it each time.

    Args:
        first: the loss of an evaluation.
        evaluate: makes another one of the same parameters; called once, and where the loss is little apart twice.
        eps: of the losses' precision.

    Raises:
        ValueError: the losses are apart.
    """
    again, rounding = evaluate(), math.sqrt(eps)
    apart = _apart(first, again)
    if apart > _LOW or (apart > rounding and _apart(again, evaluate()) > rounding):
        raise ValueError(_ANOTHER.format(first, again))


def _apart(a: float, b: float) -> float:
    """How far numbers are apart, as a share of the larger one; 0 if one of them is not finite."""
    apart = abs(a - b) / max(abs(a), abs(b), sys.float_info.min)
    return apart if math.isfinite(apart) else 0.0


_ANOTHER = (
    "closure has the loss {:.6g} when it is called first, and {:.6g} when it is called again at the same parameters: "
    "it takes another batch each time, draws from np.random.default_rng() or the like, or counts its calls. All "
    "evaluations of a step are of one function. Fetch the batch, and draw and count, before the step; generators of "
    "PyTorch, the global ones of Python and NumPy, and buffers of the model are put back between evaluations."
)
