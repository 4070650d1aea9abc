"""Operators on lists of tensors (``torch._foreach_*``): the plain operator on each of their entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_PREFIX = "_foreach_"


def _norm(x: Any, p: Any = 2, dtype: Any = None) -> Any:
    return torch.linalg.vector_norm(x, p, dtype=dtype)


def _bounded(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, other: op(x, torch.as_tensor(other, dtype=x.dtype, device=x.device))


_ENTRYWISE: dict[str, Callable[..., Any]] = {
    "addcmul": lambda x, a, b, value=1: torch.addcmul(x, a, b, value=value),
    "addcdiv": lambda x, a, b, value=1: torch.addcdiv(x, a, b, value=value),
    "norm": _norm,
    "maximum": _bounded(torch.maximum),
    "minimum": _bounded(torch.minimum),
    "clamp_min": lambda x, low: torch.clamp(x, min=low),
    "clamp_max": lambda x, high: torch.clamp(x, max=high),
    "zero": torch.zeros_like,
    "clone": torch.clone,
}


def on_lists(func: OpOverload) -> Callable[..., Any] | None:
    """A function that does ``func`` entry by entry; None where it is no operator on lists."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or not name.startswith(_PREFIX):
        return None
    base = name.removeprefix(_PREFIX)
    op = _ENTRYWISE.get(base) or getattr(torch, base, None)
    if op is None:
        return None

    def each(first: Any, *args: Any, **kwargs: Any) -> list[Any]:
        entry = lambda a, i: a[i] if isinstance(a, (list, tuple)) else a
        return [
            op(x, *(entry(a, i) for a in args), **{k: entry(a, i) for k, a in kwargs.items()})
            for i, x in enumerate(first)
        ]

    return each
