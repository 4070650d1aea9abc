"""TorchScript without its optimised plans, which differentiate by themselves, fuse operators and detach their inputs.

A function that has run a few times has such a plan for good. So a copy of it runs, which has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import _get_overloaded_args, handle_torch_function

from imstep.complexstep.errors import UnsupportedOperatorError

SCRIPTED = (torch._C.ScriptFunction, torch._C.ScriptMethod)
"""What TorchScript makes of functions and methods."""

_lock = Lock()
_open = 0  # contexts, in all threads
_calls: dict[type, Callable[..., Any]] = {}  # what calls each kind where there are none
_copies: WeakKeyDictionary[Any, tuple[Callable[..., Any], set[str]]] = WeakKeyDictionary()


@contextmanager
def unoptimised() -> Iterator[None]:
    """A context in which TorchScript runs operator by operator, in threads that have a dispatch mode."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _open
    with _lock:
        _open += change
        if _open == change == 1:
            _calls.update((kind, kind.__call__) for kind in SCRIPTED)
            for kind in SCRIPTED:
                kind.__call__ = _run  # type: ignore[method-assign, assignment]
        elif _open == 0:
            for kind in SCRIPTED:
                kind.__call__ = _calls[kind]  # type: ignore[method-assign]


def _run(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    # Methods ask their arguments, functions do not. Modes see what is within.
    if any(type(a) not in (Tensor, Parameter) for a in _get_overloaded_args(given)):
        return handle_torch_function(function, given, *args, **kwargs)
    chosen = by_operators if torch._C._len_torch_dispatch_stack() else _calls[type(function)]
    return chosen(function, *args, **kwargs)


def by_operators(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call one of ``SCRIPTED``, operator by operator; within :func:`unoptimised`."""
    given = _positional(function, args, kwargs)
    if given is None:  # one that does not fit is told there
        return _calls[type(function)](function, *args, **kwargs)
    known = _copies.get(function)
    if known is None:
        receivers = _left_open(function)
        known = torch._C._create_function_from_graph(function.name, function.graph), receivers
        _copies[function] = known
    copy, receivers = known
    if receivers:
        _flush(function, receivers)
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        return _calls[torch._C.ScriptFunction](copy, *given)
    finally:
        torch._C._set_graph_executor_optimize(before)


def _positional(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """All arguments in the order of the signature, the object of a method first; None where they do not fit it."""
    given = [function.owner, *args] if isinstance(function, torch._C.ScriptMethod) else list(args)
    arguments = function.schema.arguments
    if len(given) > len(arguments):
        return None
    used = 0
    for argument in arguments[len(given) :]:
        if argument.name in kwargs:
            used += 1
            given.append(kwargs[argument.name])
        elif argument.has_default_value():
            given.append(argument.default_value)
        else:
            return None
    return given if used == len(kwargs) else None


# --- what has plans of its own ----------------------------------------------------------------------------------


def _left_open(function: Any) -> set[str]:
    """The attributes whose methods are found when it runs, by their interface alone; "" for what is no attribute."""
    graph = function.inlined_graph  # nodes are gone with it
    if graph.findAllNodes("prim::fork"):
        raise UnsupportedOperatorError(
            "torch.jit.fork",
            "it computes in another thread, out of sight of the arithmetic.",
            "Call the function as it is, without fork and wait.",
        )
    receivers = [next(iter(node.inputs())).node() for node in graph.findAllNodes("prim::CallMethod")]
    return {node.s("name") if node.kind() == "prim::GetAttr" else "" for node in receivers}


def _flush(method: Any, receivers: set[str]) -> None:
    """Drop the plans of all methods of a module and those within, of which ``receivers`` are attributes."""
    owner = method.owner if isinstance(method, torch._C.ScriptMethod) else None
    modules: list[Any] = [owner] if isinstance(owner, torch._C.ScriptModule) else []
    names: set[str] = set()
    for module in modules:
        for name in module._method_names():
            module._get_method(name)._debug_flush_compilation_cache()
        within = [name for name, _ in torch._C.ModuleDict(module).items()]
        modules += [module.getattr(name) for name in within]
        names.update(within)
    if not receivers <= names:
        raise UnsupportedOperatorError(
            "torch.jit.interface",
            "a method of an object of which only the interface is known runs by a plan of TorchScript's own, which "
            "differentiates by itself.",
            "Name the class of the object, or leave out torch.jit.script.",
        )
