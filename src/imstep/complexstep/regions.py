"""Where Python code runs: in the user's own call, in an ``autograd.Function``, or in a backward pass.

Autograd switches gradients off around the forward of a Function and, mostly, in a backward pass; what code does there
is recorded nowhere, so it can cut nothing. Only the stack tells. A checkpoint is a Function, or a hook of a backward
pass, that means to be neither: what it runs counts as the user's own call.
"""

from __future__ import annotations

import sys
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd import functional, grad_mode, graph
from torch.autograd.function import BackwardCFunction, Function
from torch.utils import checkpoint

_LIBRARY = str(Path(__file__).resolve().parents[1])
_APPLY = getattr(Function.apply, "__func__", None)  # without a frame, being built in, as of PyTorch 2.14
_FORWARD = None if _APPLY is None else _APPLY.__code__
_PASSES_BACK = ("apply", "apply_boxed", "apply_jvp")  # the second as of PyTorch 2.13
_BACKWARD = {
    id(getattr(BackwardCFunction, name).__code__) for name in _PASSES_BACK if hasattr(BackwardCFunction, name)
}
_Forwards: TypeAlias = dict[int, tuple[CodeType, bool]]  # by id, since code that a compiler writes may have no hash
_PASS = graph._engine_run_backward.__code__
_TAKES_UP = functional._grad_preprocess.__code__
_CONTEXTS = {"__enter__", "__exit__"}
_AGAIN = {"backward", "unpack_hook"}  # where a checkpoint runs what it was given once more


def caller() -> FrameType | None:
    """The frame that called the function whose handlers, of this arithmetic and of those within it, run now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "__torch_function__":
        frame = frame.f_back
    while frame is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename.startswith(_LIBRARY)
    ):
        frame = frame.f_back
    return frame


def is_checkpoint(frame: FrameType | None) -> bool:
    """Whether ``frame`` is one of PyTorch's checkpoints."""
    return frame is not None and frame.f_code.co_filename == checkpoint.__file__


def keeps_graph(frame: FrameType | None) -> bool:
    """Whether ``frame`` is where ``torch.autograd.functional``, with ``create_graph=True``, takes up what does not
    require gradients: it detaches it for a graph of its own, but what it finds is to depend on it."""
    return frame is not None and frame.f_code is _TAKES_UP and bool(frame.f_locals.get("create_graph"))


def functions_around(frame: FrameType | None) -> int:
    """How many Functions (forward or backward) and backward passes ``frame`` runs in, those of checkpoints left out."""
    found, in_pass, own, again = 0, False, False, False
    forwards = {} if _APPLY else _forwards()
    while frame is not None:
        code = frame.f_code
        if is_checkpoint(frame):
            own |= code.co_name == "forward"
            again |= code.co_name in _AGAIN
        elif code is _PASS:
            in_pass, found, again = True, found + (not again), False
        elif code is _FORWARD and own:
            own = False
        elif not again and (id(code) in _BACKWARD or (code is _FORWARD if _APPLY else _enters(frame, forwards))):
            found += 1
        frame = frame.f_back
    # A thread of the engine's own, for another device, does not show who asked for the pass.
    alone = not in_pass and not again and torch._C._current_graph_task_id() != -1
    return found + alone


def _enters(frame: FrameType, forwards: _Forwards) -> bool:
    """Whether a Function's built-in ``apply`` has called ``frame``; ``forwards`` are those of :func:`_forwards`."""
    _, own = forwards.get(id(frame.f_code), (None, None))
    if own is not False:  # f_locals are read where needed only: Python keeps what they hold as long as the frame
        return bool(own)
    values = frame.f_locals
    given = next(iter(values.values()), None)
    if isinstance(given[0] if isinstance(given, tuple) and given else given, BackwardCFunction):
        return True
    around = [values[name] for name in frame.f_code.co_freevars if callable(values.get(name))]
    return any(id(getattr(unwrap(decorated), "__code__", None)) in forwards for decorated in around)


_LATEST: dict[tuple[int, ...], _Forwards] = {}


def _forwards() -> _Forwards:
    """The code that Functions run forward, and whether it is theirs alone, as that of a decorator is not."""
    kinds = Function.__subclasses__()
    for kind in kinds:  # it grows
        kinds += kind.__subclasses__()
    key = tuple(map(id, kinds))
    found = _LATEST.get(key)
    if found is None:
        found = {id(code): (code, own) for kind in kinds for code, own in _run_forward(kind).items()}
        _LATEST.clear()
        _LATEST[key] = found
    return found


def _run_forward(kind: Any) -> dict[CodeType, bool]:
    found: dict[CodeType, bool] = {}
    contextless = kind.setup_context is not Function.setup_context
    for method in (kind.forward, kind.setup_context):
        inner = unwrap(method)
        if isinstance(method, FunctionType) and isinstance(inner, FunctionType):
            found[inner.__code__] = True
            found[method.__code__] = inner is method and (contextless or not method.__closure__)
    return found


class Switch(NamedTuple):
    """A change of grad mode.

    Attributes:
        event: "__enter__" or "__exit__" of a context; another name for a call as a function.
        user: the code that entered or left the context, or called the function.
        delayed: whether the context has made the change when it was created.
    """

    event: str
    user: FrameType | None
    delayed: bool

    @property
    def runs_again(self) -> bool:
        """Whether a checkpoint is about to run in a backward pass what it was given, or has done so."""
        return is_checkpoint(self.user) and self.user.f_code.co_name in _AGAIN  # type: ignore[union-attr]


def switch() -> Switch:
    """Who changes grad mode, for a handler of ``torch._C._set_grad_enabled``."""
    frame, event, delayed = caller(), "", False
    while frame is not None and frame.f_code.co_filename == grad_mode.__file__:
        event = frame.f_code.co_name
        delayed = isinstance(frame.f_locals.get("self"), torch.set_grad_enabled) and event in _CONTEXTS
        frame = frame.f_back
    return Switch(event, frame, delayed)
