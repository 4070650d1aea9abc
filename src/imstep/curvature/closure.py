"""A user's closure: what it is called in, what it returns, and what it does to gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import unseen
from imstep.curvature.backward import BackwardCalls, number
from imstep.curvature.hooks import REMEDY, HookWatch
from imstep.curvature.outsiders import refusing_outsiders
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.surroundings import Surroundings

Closure = Callable[[], Any]


class UserClosure:
    """A closure, and what its first call has shown of it.

    Args:
        function: returns the loss, a tensor with one entry; or calls ``backward()`` on it and returns anything.
        parameters: the vector that is differentiated.
        stale: whether ``.grad`` holds gradients that the closure must not add to.

    Attributes:
        surroundings: what it is called in.
        returned: what it returned first, as a 0-dim tensor; None where that is no number.
        look: told the loss, or its parts, with their graphs, in the first call; to be set before.
        hook_factors: (n,), by which hooks on parameters multiply the gradient; None where they change nothing.
    """

    def __init__(self, function: Closure, parameters: ParameterVector, stale: bool) -> None:
        self.surroundings = Surroundings(parameters)
        self._function, self._parameters, self._stale = function, parameters, stale
        self._refusing = refusing_outsiders(parameters.tensors, parameters.names)  # before our own views are made
        self._known = False
        self._plain = False  # whether its backward passes are for the parameters alone
        self._hidden = False  # whether they reach parameters that graphs do not lead to
        self._weights: list[Tensor] = []
        self._others: list[tuple[Tensor, Tensor | None]] = []
        self.returned: Tensor | None = None
        self.look: Callable[[Sequence[Tensor]], None] | None = None
        self.hook_factors: Tensor | None = None

    def call(self) -> Any:
        """What it returns, as it is.

        Raises:
            ValueError: it computes with constants in the memory of the parameters.
        """
        with self.surroundings.entered(), nullcontext() if self._known else self._refusing:
            return self._function()

    def loss(self, numbers: Callable[[], range], skip: bool = False) -> tuple[Tensor, BackwardCalls]:
        """The function that it differentiates, 0-dim, with its graph; and what it called ``backward()`` on.

        Args:
            numbers, skip: see :class:`BackwardCalls`.
        """
        called = BackwardCalls(
            self._parameters.tensors,
            numbers,
            skip=skip,
            plain=self._plain,
            stale=self._stale and not self._known,
            hidden=self._hidden,
            look=None if self._known else self.look,
        )
        with graphs_recorded(), called:
            returned = self.call()
        with graphs_recorded():  # whatever the closure has left
            loss = called.loss(returned)
        if not self._known:
            self._note(called, returned, loss)
        elif not same(called.weights, self._weights):
            raise ValueError(
                "closure calls backward(gradient) with a gradient that changes with the parameters; what it adds to "
                "curvature would be missed. Call backward() on the loss itself."
            )
        return loss, called

    def _note(self, called: BackwardCalls, returned: Any, loss: Tensor) -> None:
        """What the first call shows."""
        with unseen():
            hooked = any(p._post_accumulate_grad_hooks for p in self._parameters.tensors)
            frozen = not all(p.requires_grad for p in self._parameters.tensors)
        if hooked and not called.ran:
            raise ValueError(
                "a parameter has a post-accumulate-grad hook, which is not run, since no backward() of the closure "
                f"is. {REMEDY}"
            )
        if frozen:
            raise ValueError(
                "closure set requires_grad=False on a parameter of the optimizer and left it so. Freeze parameters "
                "outside the closure: a step leaves them out then."
            )
        self._plain, self._weights = not (called.seen.others or called.hidden), called.weights
        self._hidden = called.hidden
        self._others = [(t, t.grad) for t in called.seen.others]
        value = number(returned)
        self.returned = value if value is None or isinstance(returned, Tensor) else value.to(loss.detach())
        self._known = True

    @contextmanager
    def own_gradients(self) -> Iterator[None]:
        """``.grad`` fields empty for its own ``backward()``, and put back; other leaves keep what the first call left.
        """
        inputs = self._parameters.tensors
        before = [p.grad for p in inputs]
        for p in inputs:
            p.grad = p.grad.clone() if self._stale and not self._known and p.grad is not None else None
        for t, _ in self._others:
            t.grad = None
        try:
            yield
        finally:
            for p, g in zip(inputs, before, strict=True):
                p.grad = g
            for t, g in self._others:
                t.grad = g

    @contextmanager
    def watching_hooks(self) -> Iterator[None]:
        """A context for the first backward pass, after which :attr:`hook_factors` are known."""
        hooks = HookWatch(self._parameters.tensors)
        with hooks.watching():
            yield
        self.take_hooks(hooks.factors())

    def take_hooks(self, factors: Sequence[Tensor | None] | None) -> None:
        """Keep what a first backward pass has shown of hooks, by parameter, as :attr:`hook_factors`."""
        if factors is not None:
            whole = zip(factors, self._parameters.tensors, strict=True)
            self.hook_factors = self._parameters.flatten([torch.ones_like(p) if f is None else f for f, p in whole])


@contextmanager
def graphs_recorded() -> Iterator[None]:
    """As ``torch.enable_grad()``; where it is on already, without a switch, at which arithmetics search the stack."""
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            yield
        return
    try:
        yield
    finally:
        if not torch.is_grad_enabled():  # the closure has left it so
            torch.set_grad_enabled(True)


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same values."""
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def usable(gradients: list[Tensor | None], name: str = "the loss") -> list[Tensor | None]:
    """The gradients of what ``name`` says; raises if none depends on a parameter, or one is sparse."""
    if all(g is None for g in gradients):
        raise ValueError(
            f"{name} depends on none of the parameters: every gradient is None. "
            "Check that the closure evaluates the model whose parameters were given."
        )
    with unseen():
        sparse = any(g is not None and g.layout is not torch.strided for g in gradients)
    if sparse:
        raise ValueError("a gradient is sparse; use dense gradients, such as nn.Embedding(..., sparse=False).")
    return gradients
