"""Backward passes in which function modes see what the user's code does: Functions, hooks, checkpoints run again.

PyTorch takes a mode off while it carries out a call that the mode has seen, so none sees what a backward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from imstep.complexstep.graph import walk
from imstep.complexstep.tensor import PLAIN

_LIBRARY = __name__.split(".")[0]


def _seen_within(function: Any) -> Callable[..., Any]:
    """A function of PyTorch's that modes do not see, while they go on to see what it calls."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    same = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


grad = _seen_within(torch.autograd.grad)
""":func:`torch.autograd.grad`; function modes see the user's code that it runs, and not the call itself."""

backward = _seen_within(torch.autograd.backward)
""":func:`torch.autograd.backward`, likewise."""


def _of_tensor(
    t: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None
) -> None:
    backward(t, gradient, retain_graph, create_graph, inputs=inputs)


PASSES: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: grad,
    torch.autograd.backward: backward,
    Tensor.backward: _of_tensor,
}
"""What a user asks for a backward pass with, and what stands in for it."""


class _Last(TorchFunctionMode):
    """Beneath all modes: carries out a backward pass in sight of some of them."""

    def __init__(self, watching: list[TorchFunctionMode]) -> None:
        super().__init__()
        self._watching = watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PASSES or not PLAIN.issuperset(types):  # a subclass of Tensor has a say of its own
            return func(*args, **kwargs)
        with _active(self._watching):
            return PASSES[func](*args, **kwargs)


def watched(func: Any, args: Any, kwargs: Any, mode: TorchFunctionMode) -> Any:
    """Call one of :data:`PASSES` for the handler of ``mode``: all modes see the call, its class also what it runs."""
    modes = _get_current_function_mode_stack()
    if any(isinstance(m, _Last) for m in modes):
        return func(*args, **kwargs)
    last = _Last([*(m for m in modes if type(m) is type(mode)), mode])
    with _active([last, *modes]):
        return func(*args, **kwargs)


@contextmanager
def in_sight_of(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """A context in which of the function modes only those of a class are active."""
    with _active([m for m in _get_current_function_mode_stack() if isinstance(m, kind)]):
        yield


@contextmanager
def _active(modes: list[TorchFunctionMode]) -> Iterator[None]:
    """A context in which these modes are active, and no others."""
    before = _get_current_function_mode_stack()
    _exchange(before, modes)
    try:
        yield
    finally:
        _exchange(modes, before)


def _exchange(modes: list[TorchFunctionMode], others: list[TorchFunctionMode]) -> None:
    for _ in modes:
        _pop_mode()
    for m in others:
        _push_mode(m)


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    keep: bool = False,
    functions: bool | None = None,
) -> list[Tensor | None]:
    """The gradients of outputs with respect to leaves; None for one that they do not depend on.

    A Function may call ``backward()`` in its own, as reversible networks and re-entrant checkpoints do. What that adds
    to ``.grad`` belongs to the gradient, and is no value that ``torch.autograd.grad`` would return.

    Args:
        weights: of the outputs; None where they are scalars.
        keep: whether the graph is kept.
        functions: what :func:`runs_functions` says of the outputs; None to ask.
    """
    if not (runs_functions(outputs) if functions is None else functions):
        return list(grad(outputs, inputs, weights, retain_graph=keep, allow_unused=True))
    touched = {id(t): t for t in (*leaves(outputs), *inputs)}
    before = [t.grad for t in touched.values()]
    for t in touched.values():
        t.grad = None
    try:
        backward(outputs, weights, retain_graph=keep)
        return [t.grad for t in inputs]
    finally:
        for t, g in zip(touched.values(), before, strict=True):
            t.grad = g


def runs_functions(outputs: Iterable[Tensor]) -> bool:
    """Whether the backward pass of outputs runs that of an ``autograd.Function`` of the user's."""
    return any(map(is_users_function, nodes(outputs)))


def is_users_function(node: Any) -> bool:
    """Whether a node of autograd's graph is an ``autograd.Function`` that is not this library's."""
    return isinstance(node, BackwardCFunction) and node._forward_cls.__module__.split(".")[0] != _LIBRARY  # type: ignore[attr-defined]


def leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that autograd would lead back to."""
    tensors = list(tensors)
    yield from (t for t in tensors if t.is_leaf and t.requires_grad)
    for node in nodes(tensors):
        leaf = getattr(node, "variable", None)  # only nodes that accumulate a gradient have one
        if leaf is not None:
            yield leaf


def nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of autograd's graph behind tensors."""
    with torch._C.DisableTorchFunction():
        return walk([t.grad_fn for t in tensors])
