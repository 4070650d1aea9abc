"""Where the user cuts the graph, the imaginary part ends: ``no_grad``, ``detach``, ``.data``.

Below autograd these cuts cannot be told from PyTorch's own bookkeeping (a saved output is detached, the forward of
an ``autograd.Function`` runs without gradients), so they are watched one level up, as Python calls. A result made
inside an island is a constant, exactly as it is for ``loss.backward(create_graph=True)``. The backward pass is no
island: its operators run without gradients, and their imaginary parts are what we are after. Nor is anything within
an ``autograd.Function``: autograd records nothing there, and the Function says itself what its derivative is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from imstep.complexstep import gradients
from imstep.complexstep.errors import MOVED, NESTED, UnsupportedOperatorError
from imstep.complexstep.false_gradients import SUSPECTS, refusal
from imstep.complexstep.kernels import STEERED, plain_attention, steer
from imstep.complexstep.regions import caller, functions_around, is_checkpoint, keeps_graph, switch
from imstep.complexstep.report import Ledger
from imstep.complexstep.saved import checked_hooks
from imstep.complexstep.tensor import PLAIN, Plane

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_CUTS = {Tensor.detach, torch.detach, _DATA, getattr(Tensor, "detach_copy", None)}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_EXITS: set[Any] = {Tensor.numpy, Tensor.__array__}
_HOOKS: set[Any] = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad}
_HOOKS.add(getattr(Tensor, "grad_fn").__get__)  # noqa: B009 (its type is that of the attribute)
_WATCHED = {torch._C._set_grad_enabled, Tensor.detach_, *_CUTS, *_EXITS, *_HOOKS, *STEERED, *gradients.PASSES}
_WATCHED |= {F.gumbel_softmax, _SET_DATA, Tensor.clamp_, *SUSPECTS}
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_DETACH = torch.ops.aten.detach.default
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def unseen() -> AbstractContextManager[Any]:
    """A context whose calls no islands see, those of an arithmetic around this one either: no cuts of the user's."""
    return torch._C.DisableTorchFunction()


def plain(t: Tensor) -> Tensor:
    """``t`` without what a subclass of Tensor adds; with its graph, on the same memory."""
    if type(t) in PLAIN:
        return t
    with unseen():
        if t.is_nested:
            raise UnsupportedOperatorError("torch.nested", "a nested tensor carries no imaginary part.", NESTED)
        return Tensor.as_subclass(t, Tensor)


class Islands(TorchFunctionMode):
    """Watches Python-level calls for cuts of the graph and steers around kernels without a derivative."""

    def __init__(
        self,
        plane: Plane,
        ledger: Ledger,
        keep_graph: bool = False,
        before_write: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        self._plane, self._ledger, self._keep_graph, self._before_write = plane, ledger, keep_graph, before_write
        self._cut, self._task = False, -1  # whether code is in an island, and in which of autograd's passes
        self._before = False, -1
        self._contexts: list[tuple[bool, int]] = []
        self._outside, self._inference, self._recorded = 0, False, True  # of what is around the evaluation
        self.subclasses = False  # whether arguments may be of subclasses of Tensor
        self.final = False  # whether the backward pass that runs now is the one to differentiate
        self.passes = False  # whether the user has asked for a backward pass
        self.hooked = False  # whether hooks of the user's or of a checkpoint are on what autograd saves
        self.touched = False  # whether code of the user's may run in the backward pass: hooks, or subclasses of Tensor
        self.wrong: UnsupportedOperatorError | None = None  # why a gradient of what was computed would be
        self.at_last: WeakMethod[Callable[[Sequence[Any]], list[Any]]]  # told where that begins
        self._stack = ExitStack()

    @property
    def active(self) -> bool:
        """Whether a result made now is a constant."""
        if self._cut:
            return torch._C._current_graph_task_id() == self._task
        return torch.is_inference_mode_enabled() and self._in_inference_mode()

    def _in_inference_mode(self) -> bool:
        """Whether the user has entered ``inference_mode``, which no handler sees, since this evaluation began."""
        here = not self._inference and torch._C._current_graph_task_id() == self._task
        return here and functions_around(sys._getframe(1)) <= self._outside

    @contextmanager
    def island(self) -> Iterator[None]:
        """An island for the time of this context."""
        before = self._cut, self._task
        self._cut, self._task = True, torch._C._current_graph_task_id()
        try:
            yield
        finally:
            self._cut, self._task = before

    def __enter__(self) -> Islands:
        super().__enter__()
        self._stack.enter_context(plain_attention())
        self._contexts, self._cut, self._task = [], False, torch._C._current_graph_task_id()
        self._outside = functions_around(sys._getframe(1))
        self._inference, self._recorded = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and not PLAIN.issuperset(types):
            self.subclasses = True
            self.touched |= not all(kind in PLAIN or kind.__module__.startswith("imstep.") for kind in types)
        if _hooks(True) is not None:
            self.hooked = True
            with checked_hooks(self._plane):
                return self._call(func, args, kwargs or {})
        return self._call(func, args, kwargs or {}) if func in _WATCHED else func(*args, **(kwargs or {}))

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch._C._set_grad_enabled:
            self._toggle(bool(args[0]))
        elif func in _CUTS:
            with self.cut():
                return func(*args, **kwargs)
        elif func in _HOOKS:
            self.touched = True
        elif func in _EXITS:
            self._refuse_exit(func, args[0])
        elif func is Tensor.clamp_ and self._keeps(args, kwargs):
            return args[0]
        elif func is Tensor.detach_ and self._may_cut():
            return self._detach_in_place(*args)
        elif func in STEERED:
            return steer(func, args, kwargs, self._ledger)
        elif func in gradients.PASSES:
            self.wrong = self.wrong or refusal(func, args, kwargs)
            return self._backward_pass(func, args, kwargs)
        elif func in SUSPECTS:
            self.wrong = self.wrong or refusal(func, args, kwargs)
        elif func is F.gumbel_softmax and self._may_cut():
            return self._gumbel_softmax(*args, **kwargs)
        elif func == _SET_DATA:
            self._set_data(*args)
            return None
        return func(*args, **kwargs)

    # --- cuts ---------------------------------------------------------------------------------------------------

    def _may_cut(self) -> bool:
        """Whether code that runs now can cut the graph: not within a Function or a hook."""
        frame = caller()
        return not (is_checkpoint(frame) or keeps_graph(frame)) and functions_around(frame) <= self._outside

    @contextmanager
    def cut(self) -> Iterator[None]:
        """An island for the time of this context, where there can be one."""
        with self.island() if self._may_cut() else nullcontext():
            yield

    def _toggle(self, enable: bool) -> None:
        change = switch()
        if functions_around(change.user) > self._outside:
            return  # autograd had switched gradients off already, and nothing depends on what a Function switches
        if change.event == "__exit__":
            if self._contexts:
                self._cut, self._task = self._contexts.pop()
            return
        before = self._cut, self._task
        if change.runs_again:
            self._cut, self._task = False, torch._C._current_graph_task_id()
        elif not is_checkpoint(change.user):
            self._cut = not enable
        if change.event == "__enter__":
            self._contexts.append(self._before if change.delayed else before)
        else:
            self._before = before

    def _refuse_exit(self, func: Any, t: Tensor) -> None:
        if not self.active and self._plane.find(t) is not None:
            remedy = "call .detach() first to treat the values as constants"
            if not self._may_cut():
                remedy = "leave the Function or hook out: within it .detach() changes nothing"
            raise UnsupportedOperatorError(
                f"Tensor.{func.__name__}",
                "the imaginary part of a tensor that is being differentiated would be lost outside PyTorch.",
                f"Compute with torch functions, or {remedy}.",
            )

    def _detach_in_place(self, t: Tensor) -> Tensor:
        # What was saved of it before stays as it was; from here on it is a constant in memory of its own.
        with self.cut():
            t.detach_().data = t.clone()
        return t

    def _keeps(self, args: Any, kwargs: Any) -> bool:
        """Whether ``clamp_`` finds a detached view within its bounds, as it mostly does in ``Gamma.rsample``."""
        with unseen():
            t = plain(args[0])
            return self._plane.is_constant(t) and torch.equal(t.clamp(*args[1:], **kwargs), t)

    def _set_data(self, t: Tensor, data: Tensor) -> None:
        live = not is_lazy(t) and self._plane.find(t) is not None
        if self._before_write is not None:
            self._before_write(t, moved=True)
        t.data = data
        if live and self._plane.find(t) is None:
            raise UnsupportedOperatorError("Tensor.data = ...", *MOVED)

    def _gumbel_softmax(
        self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> Tensor:
        # PyTorch's own detaches inside, out of sight of this mode.
        soft = F.gumbel_softmax(logits, tau, False, dim=dim)
        if not hard:
            return soft
        with self.cut():
            constant = soft.detach().clone()
        choice = torch.zeros_like(logits).scatter_(dim, constant.argmax(dim, keepdim=True), 1.0)
        return choice - constant + soft

    def hides_cut(self, func: Any) -> bool:
        """Whether ``func``, which no Python function was seen to call, is a cut, or within one: in TorchScript.

        What autograd detaches to save it, or in a backward pass, is none.
        """
        if self._cut or torch._C._current_graph_task_id() != self._task:
            return False
        if func is _DETACH:
            hidden = torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
        else:
            hidden = self._recorded and not torch.is_grad_enabled()
        return hidden and functions_around(sys._getframe(1)) <= self._outside

    # --- backward passes ----------------------------------------------------------------------------------------

    def gradient(
        self, outputs: Sequence[Tensor], inputs: list[Tensor], weights: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """The gradient that is to be differentiated; None for an input that ``outputs`` do not depend on."""
        functions = gradients.runs_functions(outputs)
        seen = gradients.in_sight_of(Islands) if functions or self.hooked else unseen()
        with self._final_pass(outputs), seen:
            return gradients.gradients(outputs, inputs, weights, self._keep_graph, functions)

    def follow(self, forward: Islands) -> None:
        """Take over from the evaluation whose backward pass is to come."""
        self.hooked, self.subclasses, self.wrong = forward.hooked, forward.subclasses, forward.wrong

    def _runs_code(self, outputs: Any) -> bool:
        """Whether the backward pass of outputs runs code that must be seen: of Functions, or hooks on saved tensors."""
        return self.hooked or gradients.runs_functions(t for t in tree_leaves(outputs) if isinstance(t, Tensor))

    @contextmanager
    def _final_pass(self, outputs: Sequence[Any]) -> Iterator[None]:
        if self.wrong is not None:
            raise self.wrong
        begin = self.at_last()
        assert begin is not None
        handles = begin(outputs)
        before, self.final = self.final, True
        try:
            with torch._C._DisableAutocast():  # as PyTorch asks for, of backward passes
                yield
        finally:
            self.final = before
            for handle in handles:
                handle.remove()

    def _backward_pass(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A pass that the user asks for: with ``backward()`` the gradient itself, else part of the loss."""
        self.passes = True
        if func is torch.autograd.grad:
            found = self._run(func, args, kwargs)
            create_graph = kwargs.get("create_graph", args[4] if len(args) > 4 else False)
            if create_graph or not self._may_cut():
                return found
            with self.cut():
                return tree_map(lambda g: g.clone() if isinstance(g, Tensor) else g, found)
        if self._keep_graph and len(args) > 2:
            args = (*args[:2], True, *args[3:])
        elif self._keep_graph:
            kwargs = {**kwargs, "retain_graph": True}
        with self._final_pass(tree_leaves((args[:1], kwargs))):
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._runs_code((args[:1], kwargs)):
            return gradients.watched(func, args, kwargs, self)
        return func(*args, **kwargs)
