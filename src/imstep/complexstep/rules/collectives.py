"""Functional collectives of ``torch.distributed``: linear maps of what several processes hold.

The function that is differentiated is then one of all processes together: f = Σ f_r over the processes r. Forward, the
imaginary parts are exchanged as the real ones are; backward, PyTorch's own derivatives exchange cotangents. So every
process must come to the same collectives in the same order, whether its own tensors depend on parameters or not: the
steps of a tape that belong to them are never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from imstep.complexstep.errors import COLLECTIVE, UnsupportedOperatorError
from imstep.complexstep.registry import exact, rule
from imstep.complexstep.steps import EXCHANGES

__all__ = ["exchanges", "exchanging"]

Permitted = Callable[[Sequence[int]], str | None]
"""Given the ranks of a group, why closures may not exchange tensors within it; None where they may."""

_permitted: list[Permitted] = [lambda ranks: "Its optimizer or operator knows of one process."]
_count = 0


@contextmanager
def exchanging(permitted: Permitted) -> Iterator[None]:
    """A context for a closure that may exchange tensors with those of other processes."""
    _permitted.append(permitted)
    try:
        yield
    finally:
        _permitted.pop()


def exchanges() -> int:
    """How many times imaginary parts were exchanged so far; a number that is to be the same for all processes."""
    return _count


def _carried_out(func: Any, x: Any, rest: Any) -> Any:
    global _count
    _count += 1
    return torch.ops._c10d_functional.wait_tensor(func(x.contiguous(), *rest))


def _check(func: Any, group: Any, reduction: str) -> None:
    if reduction != "sum":
        raise UnsupportedOperatorError(
            func, f"its {reduction} over processes is not differentiated.", "Take the sum, and divide by their number."
        )
    if torch._C._current_autograd_node() is not None:  # of a forward pass that was looked at
        return
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    ranks = dist.get_process_group_ranks(group)
    reason = _permitted[-1](ranks) if len(ranks) > 1 else None
    if reason is not None:
        raise UnsupportedOperatorError(func, f"a closure exchanges tensors with other processes. {reason}", COLLECTIVE)


def _collective(op: Any, reduces: bool) -> None:
    @rule(op, family="linear", finite=exact)
    def linearize(x: Any, *rest: Any) -> Any:
        _check(op, rest[-1], rest[0] if reduces else "sum")
        like = x.new_zeros(()).expand(x.shape)
        return _carried_out(op, x, rest), lambda dx: _carried_out(op, like if dx is None else dx, rest)


if dist.is_available():
    for _name, _reduces in (("all_reduce", True), ("all_gather_into_tensor", False), ("reduce_scatter_tensor", True)):
        _op = getattr(torch.ops._c10d_functional, _name).default
        _collective(_op, _reduces)
        EXCHANGES.add(id(_op))

    @rule(torch.ops._c10d_functional.wait_tensor.default, family="linear", finite=exact)
    def wait_tensor(x: Any) -> Any:
        return x, None  # itself, with what belongs to it
