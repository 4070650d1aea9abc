"""What layers of recurrent networks have in common that are one operator for all of their steps.

PyTorch's own steps take a dozen operators and three times as many backward; each costs more than its arithmetic here.
The formulas of a layer stand in its module twice: as operators that autograd and the arithmetics can look into, and as
kernels that write into memory made for all steps at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("imstep", "DEF")
"""What the operators are defined in."""


class StepsFunction(torch.autograd.Function):
    """A layer as autograd differentiates it; its first argument are the projected inputs, (time, batch, ...).

    Attributes:
        WEIGHT, BIAS: which of its arguments the weight of the states is, and the bias beside it; None where that is a
            part of the projected inputs.
    """

    WEIGHT: int
    BIAS: int | None

    @staticmethod
    def states(ctx: Any) -> Tensor:
        """What the weight has multiplied, (time, batch, hidden)."""
        raise NotImplementedError

    @staticmethod
    def at_product(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradients at the products of the weight and states, from those at the projected inputs: the same."""
        return gradient


def before(first: Tensor, later: Tensor) -> Tensor:
    """What each step starts from: the first state, and all others but the last."""
    return torch.cat([first.unsqueeze(0), later[:-1]])


def steps_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors (time, ...), step by step."""
    return zip(*(t.unbind(0) for t in tensors), strict=True)
