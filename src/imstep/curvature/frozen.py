"""A closure evaluated several times at different parameters, but always on the same batch.

A step of a second-order method needs the loss, its gradient, products with its Hessian and trial losses of *one*
function. Between the evaluations everything else that a closure may depend on is put back: the random
number generators (dropout masks, collocation points drawn inside) and every tensor that the model overwrites (running
statistics, power iterations, counters).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imstep.complexstep import Arithmetic
from imstep.complexstep.gauss_newton import LossSplit, split_loss
from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import Tape
from imstep.curvature.parameters import ParameterVector

Closure = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Linearisation:
    """Loss and gradient at a point, and the tape of the gradient's derivative there.

    Attributes:
        loss: 0-dim tensor; with its graph if the evaluation was to keep it.
        gradient: (n,).
        tape: maps a direction, given per parameter, to the Hessian product, per parameter.
        split: the loss as a convex function of outputs; None where it has another form.
        report: the operators that the evaluation met.
    """

    loss: Tensor
    gradient: Tensor
    tape: Tape
    split: LossSplit | None
    report: OperatorReport


class FrozenClosure:
    """A closure on one batch, evaluated at whatever the parameters are at the time.

    Args:
        closure: returns the loss, a tensor with one entry; it may also have called ``zero_grad()`` and ``backward()``.
        parameters: the vector that is differentiated.

    Attributes:
        gradients, losses: evaluations so far with and without a backward pass.
        report: the operators that the last :meth:`product` met.
    """

    def __init__(self, closure: Closure, parameters: ParameterVector) -> None:
        self._closure, self._parameters = closure, parameters
        self._random = _RandomState(parameters.device)
        self._random_after: _RandomState | None = None
        self._writes = _Writes(parameters.tensors)
        self.gradients = self.losses = 0
        self.report = OperatorReport(())

    # --- evaluations --------------------------------------------------------------------------------------------

    def linearise(
        self,
        observer: AbstractContextManager[Any] | None = None,
        memory_budget: int | None = None,
        keep_graph: bool = False,
    ) -> Linearisation:
        """Loss, gradient and tape at the current parameters, from one evaluation.

        Args:
            observer: a context entered around the closure; what it has seen can be differentiated further.
            memory_budget: bytes that the tape may hold; None for no limit.
            keep_graph: whether autograd's graph survives the evaluation; it does for an observer.

        Raises:
            TapeTooLargeError: the tape would not fit the budget.
            TapeChangedError: the closure overwrote what the tape needs.
        """
        tape, keep_graph = Tape(memory_budget), keep_graph or observer is not None
        arithmetic = Arithmetic(tape=tape, before_write=self._writes.before, keep_graph=keep_graph)
        with observer or nullcontext():
            loss, gradients = self._differentiate(arithmetic)
        split = split_loss(tape, arithmetic.reference(loss))
        arithmetic.finish(gradients)
        kept = loss if keep_graph else loss.detach()
        return Linearisation(kept, self._parameters.flatten(gradients), tape, split, arithmetic.report())

    def product(self, direction: Tensor, h: float | None = None) -> Tensor:
        """The Hessian product with ``direction`` (n,), by an evaluation of its own; ``h`` as for ``Arithmetic``."""
        arithmetic = Arithmetic(h, before_write=self._writes.before)
        _, gradients = self._differentiate(arithmetic, self._parameters.unflatten(direction))
        self.report = arithmetic.report()
        parts = [None if g is None else arithmetic.value(g).im for g in gradients]
        return self._parameters.flatten(parts)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and gradient (n,) at the current parameters."""
        with self._same_state(), self._own_gradients():
            loss = self._call()
            gradients = self._gradients_of(loss, torch.autograd.grad)
        return loss.detach(), self._parameters.flatten(gradients)

    def watched_gradient(self) -> tuple[Tensor, Tensor]:
        """As :meth:`gradient`, noting what the closure overwrites; for a first evaluation without a tape."""
        arithmetic = Arithmetic(before_write=self._writes.before)
        loss, gradients = self._differentiate(arithmetic, [None] * len(self._parameters.tensors))
        return loss.detach(), self._parameters.flatten(gradients)

    def loss(self) -> Tensor:
        """The loss alone (0-dim) at the current parameters: a ``backward()`` in the closure is skipped."""
        self.losses += 1
        with self._same_state(), self._own_gradients(), _NoBackward(self._parameters.tensors):
            return self._call().detach()

    def _differentiate(
        self, arithmetic: Arithmetic, directions: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        inputs = self._parameters.tensors
        for at, p in enumerate(inputs):
            arithmetic.attach(p, None if directions is None else directions[at])
        try:
            with self._same_state(), self._own_gradients(), arithmetic:
                loss = self._call()
                take = lambda loss, inputs, allow_unused: arithmetic.gradient(loss, inputs)
                gradients = self._gradients_of(loss, take)
        finally:
            for p in inputs:
                arithmetic.release(p)
        return loss, gradients

    def _call(self) -> Tensor:
        with torch.enable_grad():
            loss = self._closure()
            one = isinstance(loss, Tensor) and loss.numel() == 1
            scalar = loss.reshape(()) if one else loss
        if not one:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
            raise ValueError(
                f"closure returned {got}; a step needs the loss, a tensor with one entry. "
                "Reduce it, for instance with .mean(), and return it."
            )
        if loss.is_complex():
            raise ValueError(
                f"closure returned a loss of dtype {loss.dtype}; a loss is real. Return loss.real or loss.abs()."
            )
        return scalar

    def _gradients_of(self, loss: Tensor, take: Callable[..., Any]) -> list[Tensor | None]:
        self.gradients += 1
        inputs = self._parameters.tensors
        gradients = [p.grad for p in inputs]
        if all(g is None for g in gradients):
            if loss.grad_fn is None:
                raise ValueError(
                    "closure returned a loss without a graph (grad_fn is None); a gradient needs it. "
                    "Return the loss itself, not loss.item() or loss.detach(), and do not compute it under no_grad."
                )
            gradients = list(take(loss, inputs, allow_unused=True))
        if all(g is None for g in gradients):
            raise ValueError(
                "the loss depends on none of the parameters: every gradient is None. "
                "Check that the closure evaluates the model whose parameters were given."
            )
        if any(g is not None and g.layout is not torch.strided for g in gradients):
            raise ValueError("a gradient is sparse; use dense gradients, such as nn.Embedding(..., sparse=False).")
        return gradients

    # --- the same state for every evaluation --------------------------------------------------------------------

    def leave(self, accepted: bool) -> None:
        """End the step: random numbers and buffers as after one evaluation, buffers as before it if not accepted."""
        if self._random_after is not None:
            self._random_after.restore()
        self._writes.finish(accepted)

    def undo(self) -> None:
        """End the step as if no evaluation had been made."""
        self._random.restore()
        self._writes.finish(False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluations inside leave no trace: random numbers and buffers are put back to what they are now."""
        now, contents = _RandomState(self._parameters.device), self._writes.contents()
        try:
            yield
        finally:
            now.restore()
            self._writes.replace(contents)

    @contextmanager
    def _same_state(self) -> Iterator[None]:
        first = self._random_after is None
        if not first:
            self._random.restore()
            self._writes.rewind()
        yield
        if first:
            self._random_after = _RandomState(self._parameters.device)
            self._writes.keep()

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """``.grad`` fields empty for the closure's own ``backward()``, and put back afterwards."""
        inputs = self._parameters.tensors
        before = [p.grad for p in inputs]
        for p in inputs:
            p.grad = None
        try:
            yield
        finally:
            for p, g in zip(inputs, before, strict=True):
                p.grad = g


class _NoBackward(TorchFunctionMode):
    """Skips ``loss.backward()``: for a trial step only the loss is wanted; gradients read as zeros."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # With create_graph it may be part of the loss, such as a penalty on a gradient.
        create_graph = kwargs.get("create_graph", args[3] if len(args) > 3 else False)
        if func not in (Tensor.backward, torch.autograd.backward) or create_graph:
            return func(*args, **kwargs)
        for p in self._tensors:
            p.grad = torch.zeros_like(p)
        return None


class _RandomState:
    """The state of all global random number generators that a closure may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class _Writes:
    """Tensors of the model that the closure overwrites: their contents before and after the first evaluation.

    Parameters are not among them, though a closure may overwrite them as well: an embedding with ``max_norm`` does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._after: dict[int, Tensor] = {}

    def before(self, t: Tensor) -> None:
        """Note the whole storage of ``t``, which is about to be overwritten, unless it is known."""
        storage = t.untyped_storage()
        if storage._cdata not in self._before and storage._cdata not in self._parameters:
            whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage)
            self._before[storage._cdata] = whole, whole.clone()

    def keep(self) -> None:
        """Remember the contents after the first evaluation: those that stay."""
        self._after = self.contents()

    def contents(self) -> dict[int, Tensor]:
        """Copies of what the tensors hold now."""
        return {key: whole.clone() for key, (whole, _) in self._before.items()}

    def replace(self, contents: dict[int, Tensor]) -> None:
        """Put the given contents back."""
        for key, saved in contents.items():
            self._before[key][0].copy_(saved)

    def rewind(self) -> None:
        """Put everything back to what it was before the first evaluation."""
        for whole, saved in self._before.values():
            whole.copy_(saved)

    def finish(self, accepted: bool) -> None:
        """Leave the contents as after one evaluation, or as before it."""
        for key, (whole, saved) in self._before.items():
            whole.copy_(self._after.get(key, saved) if accepted else saved)
