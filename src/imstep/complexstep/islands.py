"""Where the user cuts the graph, the imaginary part ends: ``no_grad``, ``detach``, ``.data``.

Below autograd these cuts cannot be told from PyTorch's own bookkeeping (a saved output is detached, the forward of
an ``autograd.Function`` runs without gradients), so they are watched one level up, as Python calls. A result made
inside an island is a constant, exactly as it is for ``loss.backward(create_graph=True)``. The backward pass is no
island: its operators run without gradients, and their imaginary parts are what we are after.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from imstep.complexstep import recurrent
from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.report import Ledger
from imstep.complexstep.substitutes import SUBSTITUTES
from imstep.complexstep.tensor import Plane

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_CUTS = {Tensor.detach, torch.detach, _DATA, getattr(Tensor, "detach_copy", None)}
_EXITS: set[Any] = {Tensor.numpy, Tensor.__array__}
_STEPWISE: dict[Any, Any] = {torch.lstm: recurrent.lstm, torch.gru: recurrent.gru}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_PLAIN = {Tensor, Parameter}
_AVOIDED = {F.scaled_dot_product_attention, *_RECURRENT}


def _is_checkpoint(frame: FrameType) -> bool:
    return frame.f_code.co_filename == checkpoint.__file__


def _name(func: Any) -> str:
    return resolve_name(func) or str(getattr(func, "__name__", func))


def unseen() -> AbstractContextManager[Any]:
    """A context whose calls no islands see, those of an arithmetic around this one either: no cuts of the user's."""
    return torch._C.DisableTorchFunction()


def plain(t: Tensor) -> Tensor:
    """``t`` without what a subclass of Tensor adds; with its graph, on the same memory."""
    if type(t) in _PLAIN:
        return t
    with unseen():
        return Tensor.as_subclass(t, Tensor)


@contextmanager
def _native_recurrence() -> Iterator[None]:
    """Recurrent networks step by step (torch.backends.mkldnn.flags warns of other settings that it touches)."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class Islands(TorchFunctionMode):
    """Watches Python-level calls for cuts of the graph and steers around kernels without a derivative.

    The fused attention and recurrent kernels compute their backward pass from hidden state that no rule can
    reach; the mathematical formulations they stand for are used instead while this mode is active.
    """

    def __init__(self, plane: Plane, ledger: Ledger, keep_graph: bool = False) -> None:
        super().__init__()
        self._plane, self._ledger, self._keep_graph = plane, ledger, keep_graph
        self._toggles: list[bool] = []
        self._nested: list[bool] = []
        self._cut = False
        self._recurrent_again = False  # whether the backward pass will run a recurrent network forward again
        self.subclasses = False  # whether arguments may be of subclasses of Tensor
        self.final = False  # whether the backward pass that runs now is the one to differentiate
        self._stack = ExitStack()

    @property
    def active(self) -> bool:
        """Whether a result made now is a constant."""
        return self._cut and torch._C._current_graph_task_id() == -1

    def __enter__(self) -> Islands:
        super().__enter__()
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._toggles, self._nested, self._cut = [], [], False
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and not _PLAIN.issuperset(types):
            self.subclasses = True
        if func is torch._C._set_grad_enabled:
            self._toggle(bool(args[0]))
            return func(*args, **kwargs)
        if func in _CUTS:
            with self.cut():
                return func(*args, **kwargs)
        if func in _EXITS:
            self._refuse_exit(func, args[0])
        if func is Tensor.detach_:
            return self._detach_in_place(*args)
        if func in SUBSTITUTES:
            return self._substitute(func, args, kwargs)
        if func in _AVOIDED or func is F.multi_head_attention_forward:
            self._note(func, args, kwargs)
        if func in _STEPWISE and recurrent.takes(args, kwargs):
            self._note_checkpoint()
            return _STEPWISE[func](*args)
        if func in _RECURRENT:
            self._note_checkpoint()
            with _native_recurrence():
                return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._inner_gradient(func, args, kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._closure_backward(func, args, kwargs)
        if func is F.gumbel_softmax:
            return self._gumbel_softmax(*args, **kwargs)
        return func(*args, **kwargs)

    def refuse_in_checkpoint(self, func: Any) -> None:
        """Raise where a constant is made within a checkpoint: run again in the backward pass, it would be none."""
        if self._in_checkpoint(sys._getframe(1)):
            raise UnsupportedOperatorError(
                func,
                "a tensor that is being differentiated is detached, or used under no_grad, within a checkpoint; "
                "when the checkpoint is run again, that cannot be seen.",
                "Detach outside the checkpointed function, or leave the checkpoint out.",
            )

    @staticmethod
    def _in_checkpoint(frame: FrameType | None) -> bool:
        while frame is not None and not _is_checkpoint(frame):
            frame = frame.f_back
        return frame is not None

    def _note_checkpoint(self) -> None:
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self._recurrent_again |= hooked or not torch.is_grad_enabled()

    def _substitute(self, func: Any, args: Any, kwargs: Any) -> Any:
        stands_in, needed = SUBSTITUTES[func]
        named = next((k for k in ("input", "A") if k in kwargs), None)
        if named is not None:  # what PyTorch calls the first argument
            args, kwargs = (kwargs[named], *args), {k: v for k, v in kwargs.items() if k != named}
        if not needed(*args):
            return func(*args, **kwargs)
        self._ledger.avoid(_name(func))
        return stands_in(*args, **kwargs)

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _AVOIDED:
            self._ledger.avoid(_name(func))
            return
        # What PyTorch calls from here is out of sight: attention without weights is the fused one.
        if not kwargs.get("need_weights", True):
            self._ledger.avoid(_name(F.scaled_dot_product_attention))
        recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if not kwargs.get("training", True) and not recorded:
            self._ledger.avoid("torch._native_multi_head_attention")

    def _refuse_exit(self, func: Any, t: Tensor) -> None:
        if not self.active and self._plane.find(t) is not None:
            raise UnsupportedOperatorError(
                f"Tensor.{func.__name__}",
                "the imaginary part of a tensor that is being differentiated would be lost outside PyTorch.",
                "Compute with torch functions, or call .detach() first to treat the values as constants.",
            )

    def _detach_in_place(self, t: Tensor) -> Tensor:
        # What was saved of it before stays as it was; from here on it is a constant in memory of its own.
        with self.cut():
            t.detach_().data = t.clone()
        return t

    @contextmanager
    def cut(self) -> Iterator[None]:
        """An island for the time of this context."""
        before, self._cut = self._cut, True
        try:
            yield
        finally:
            self._cut = before

    def _toggle(self, enable: bool) -> None:
        # Contexts nest and only changes count, so each change either opens a context or closes the last one opened.
        # Gradients that are off without a change seen here were switched off by autograd itself: no island.
        if enable == torch.is_grad_enabled():
            if not enable:
                self._nest(sys._getframe(1))
            return
        if self._toggles and self._toggles[-1] != enable:
            self._toggles.pop()
            self._cut = bool(self._toggles) and not self._toggles[-1]
        else:
            self._toggles.append(enable)
            self._cut = not enable

    def _nest(self, frame: FrameType) -> None:
        while frame.f_code.co_name == "__torch_function__":  # an arithmetic within this one has seen the change before
            frame = cast(FrameType, frame.f_back)
        context = cast(FrameType, frame.f_back)  # frame is that of set_grad_enabled
        # Within a re-entrant checkpoint gradients are off already; the checkpoint's own context is none of the user's.
        if context.f_code.co_name == "__exit__" and self._nested:
            self._cut = self._nested.pop()
        elif context.f_code.co_name == "__enter__" and torch._C._current_graph_task_id() == -1:
            self._nested.append(self._cut)
            user = context.f_back
            self._cut = self._cut or (user is not None and self._in_checkpoint(user) and not _is_checkpoint(user))

    def gradient(
        self, outputs: Sequence[Tensor], inputs: list[Tensor], weights: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """The gradient that is to be differentiated; None for an input that ``outputs`` do not depend on."""
        with self._final_pass(), unseen():
            gradients = torch.autograd.grad(
                outputs, inputs, weights, allow_unused=True, retain_graph=self._keep_graph
            )
        return list(gradients)

    def follow(self, forward: Islands) -> None:
        """Take over from the evaluation whose backward pass is to come."""
        self._recurrent_again, self.subclasses = forward._recurrent_again, forward.subclasses

    @contextmanager
    def _final_pass(self) -> Iterator[None]:
        before, self.final = self.final, True
        # What a checkpoint runs again is out of sight of this mode.
        recurrence = _native_recurrence() if self._recurrent_again else nullcontext()
        try:
            with recurrence, torch._C._DisableAutocast():  # as PyTorch asks for, of backward passes
                yield
        finally:
            self.final = before

    def _closure_backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._keep_graph and not (len(args) > 2 and args[2]):
            kwargs = {**kwargs, "retain_graph": True}
            args = args[:2]
        with self._final_pass():
            return func(*args, **kwargs)

    def _inner_gradient(self, func: Any, args: Any, kwargs: Any) -> Any:
        create_graph = kwargs.get("create_graph", args[4] if len(args) > 4 else False)
        gradients = func(*args, **kwargs)
        if create_graph or self.final or not torch.is_grad_enabled():
            return gradients
        with self.cut():
            return tree_map(lambda g: g.clone() if isinstance(g, Tensor) else g, gradients)

    def _gumbel_softmax(
        self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> Tensor:
        # PyTorch's own detaches inside, out of sight of this mode.
        soft = F.gumbel_softmax(logits, tau, False, dim=dim)
        if not hard:
            return soft
        with self.cut():
            constant = soft.clone()
        choice = torch.zeros_like(logits).scatter_(dim, constant.argmax(dim, keepdim=True), 1.0)
        return choice - constant + soft
