"""Terms that are added to what a closure differentiates, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imstep.curvature.backward import BACKWARD, Root, parsed


class _Kept(TorchFunctionMode):
    """A context that keeps what ``backward()`` is called on, for later."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Root] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in BACKWARD:
            return func(*args, **kwargs)
        roots, _, inputs, _ = parsed(*args, **kwargs)
        if inputs is not None:  # gradients of something else
            return func(*args, **kwargs)
        self.roots += roots
        return None


def with_term(closure: Callable[[], Any], term: Callable[[], Tensor]) -> Any:
    """What a closure returns, with a term added to it; where it calls ``backward()``, to what it is called on.

    Args:
        term: 0-dim; called after the closure.
    """
    kept = _Kept()
    with kept:
        returned = closure()
    if kept.roots:
        _total([*(root.term() for root in kept.roots), term()]).backward()
    elif isinstance(returned, Tensor) and (returned.requires_grad or not torch.is_grad_enabled()):
        return returned + term()
    return returned


def _total(terms: list[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
