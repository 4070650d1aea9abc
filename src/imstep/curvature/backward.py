"""What a closure calls ``backward()`` on, and what becomes of the gradients that this leaves.

A closure may return its loss, as for ``torch.autograd.grad``, or call ``backward()`` and return whatever it likes, as
for L-BFGS. In the second case the function that a step is about is the one whose gradient is in ``.grad``: the sum of
all tensors that ``backward()`` was called on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imstep.complexstep.gradients import runs_functions
from imstep.complexstep.graph import Survey, survey, walk
from imstep.complexstep.islands import plain, unseen
from imstep.curvature.hooks import accumulation_watched, plain_copy, same_values

BACKWARD = (Tensor.backward, torch.autograd.backward)


@dataclass(frozen=True, eq=False)
class Root:
    """A tensor that ``backward()`` was called on, and the ``gradient`` it was given, None for 1."""

    value: Tensor
    weight: Tensor | None

    def products(self) -> Tensor:
        """The value's entries times those of the gradient."""
        return self.value if self.weight is None else self.value * self.weight

    def term(self) -> Tensor:
        """What it adds to the loss, 0-dim."""
        return scalar(self.value) if self.weight is None else self.products().sum()


class BackwardCalls(TorchFunctionMode):
    """A context around a closure that finds the function which the closure differentiates.

        f = Σ gradientᵀ root   over all calls of ``backward()`` since the gradients were empty

    Args:
        parameters: of whose ``.grad`` is spoken; the fields are empty, or hold what ``stale`` says.
        numbers: those that this thread has given to nodes of autograd's graph since the evaluation began.
        skip: whether to leave backward passes out: gradients of the parameters then read as ones.
        plain: whether it is known that no backward pass is for anything but the parameters.
        stale: whether the gradients that are there belong to something else.
        hidden: whether backward passes reach parameters that graphs do not lead to, as an earlier evaluation has shown.

    Attributes:
        seen: what the graphs that it met lead to.
        hidden: the same, and what this evaluation has shown.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        numbers: Callable[[], range],
        *,
        skip: bool = False,
        plain: bool = False,
        stale: bool = False,
        hidden: bool = False,
        look: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        super().__init__()
        self._look = look
        self._parameters, self._numbers = parameters, numbers
        self._skip, self._plain, self._stale = skip, plain, stale
        self._roots: list[Root] = []
        self._freed: list[Tensor] = []  # whose graphs backward() has freed
        self._create_graph = False
        self._left = self._gradients()
        self.seen, self.hidden = Survey(), hidden

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD:
            return self._backward(func, args, kwargs)
        return func(*args, **kwargs)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> None:
        roots, create_graph, inputs, kept = parsed(*args, **kwargs)
        own = {id(p) for p in self._parameters}
        if inputs is not None and own.isdisjoint(map(id, inputs)):
            return func(*args, **kwargs)
        self._settle()
        if self._stale:
            raise ValueError(_ACCUMULATED)
        values = [root.value for root in roots]
        found = Survey(reached=True) if self._plain else self.look(values)
        # Re-entrant checkpoints and reversible blocks use parameters that their graph does not lead to.
        maybe = not found.reached and runs_functions(values)
        if not (found.reached or maybe) or (maybe and self._skip and not self.hidden):
            return func(*args, **kwargs)
        if self._skip and not create_graph:
            given = [] if maybe else found.others
            others = [t for t in given if inputs is None or any(t is i for i in inputs)]
            if others:
                # A reentrant checkpoint refuses a pass for some leaves alone.
                alone = others if inputs is not None or not runs_functions(values) else None
                torch.autograd.backward(
                    [r.value for r in roots], [r.weight for r in roots], retain_graph=True, inputs=alone
                )
            for p in self._parameters:
                p.grad = torch.ones_like(p, requires_grad=False)
        else:
            # PyTorch asks for backward passes without autocast.
            with torch._C._DisableAutocast(), accumulation_watched(self._parameters):
                func(*args, **kwargs)
            if maybe and self._untouched():
                return None
            self.hidden |= maybe
            self._freed += [] if kept else values
        self._roots += roots
        self._create_graph |= create_graph
        self._left = self._gradients()
        return None

    def _untouched(self) -> bool:
        """Whether the gradients are those that the last backward pass of the parameters has left."""
        with unseen():
            kept = [(p.grad, h, c) for p, (h, c) in zip(self._parameters, self._left, strict=True)]
        return all(g is h and (g is None or c is None or same_values(g, c)) for g, h, c in kept)

    def look(self, outputs: Sequence[Tensor]) -> Survey:
        """What the graphs of ``outputs`` lead to; noted in :attr:`seen`, too."""
        if self._look is not None:
            self._look(outputs)
        found = survey(outputs, self._parameters, self._numbers())
        self.seen = self.seen + found
        return found

    @property
    def weights(self) -> list[Tensor]:
        """The ``gradient`` arguments, in the order of the calls."""
        return [root.weight.detach() for root in self._roots if root.weight is not None]

    @property
    def ran(self) -> bool:
        """Whether backward passes of the parameters were made."""
        return self.called and not self._skip

    @property
    def called(self) -> bool:
        """Whether gradients of the parameters were left that stand."""
        return bool(self._roots)

    def loss(self, returned: Any) -> Tensor:
        """The function that the closure differentiates, 0-dim, with its graph; what it returned where it does not.

        Raises:
            ValueError: it returned no loss, or one that its gradients do not belong to, or whose graph is freed; it
                changed the gradients.
        """
        self._settle()
        if not self._roots:
            if isinstance(returned, Tensor) and self._is_freed(returned):
                raise ValueError(_EMPTIED)
            return scalar(returned)
        alone = self._roots[0].value if len(self._roots) == 1 and self._roots[0].weight is None else None
        node = plain(returned).grad_fn if isinstance(returned, Tensor) else None
        if self._create_graph and node is not None and (alone is None or node is not alone.grad_fn):
            raise ValueError(
                "closure called backward(create_graph=True), which left gradients on the parameters, and returned "
                "another tensor with a graph: two functions to differentiate. If the gradients are part of the loss, "
                "take them by torch.autograd.grad(..., create_graph=True), or call zero_grad() and loss.backward()."
            )
        loss = alone.reshape(()) if alone is not None else reduce(torch.add, [root.term() for root in self._roots])
        self._compare(returned, loss)
        return scalar(loss)

    def _is_freed(self, returned: Tensor) -> bool:
        """Whether the graph of what is returned holds one that is freed."""
        with unseen():
            gone = {t.grad_fn for t in self._freed}
            return bool(gone) and not gone.isdisjoint(walk([returned.grad_fn]))

    def _compare(self, returned: Any, loss: Tensor) -> None:
        """A gradient given for many entries may be a derivative itself; then its inner product is not the loss."""
        given = [root for root in self._roots if root.weight is not None and root.value.numel() > 1]
        value = number(returned)
        if not given or value is None or self._skip:
            return
        rounding = 1e-6 * sum(float(root.products().detach().abs().sum()) for root in given)
        if not torch.allclose(value.to(loss), loss.detach(), rtol=1e-3, atol=rounding, equal_nan=True):
            raise ValueError(
                f"closure called backward(gradient) on a tensor of many entries, whose inner product with that "
                f"gradient is {float(loss):g}, and returned {float(value):g}. If the gradient is that of a loss, its "
                "own dependence on the parameters would be missed: call backward() on the loss itself."
            )

    # --- the gradients --------------------------------------------------------------------------------------------

    def _gradients(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """The gradients, and copies: lists of operators and writes by ``.data`` leave no trace in version counters."""
        with unseen():
            found = [p.grad for p in self._parameters]
        return [(g, None if g is None else plain_copy(g)) for g in found]

    def _settle(self) -> None:
        """Forget what was called before the gradients were emptied; raises if they were changed otherwise."""
        if self._untouched():
            return
        if any(p.grad is not None and bool(plain_copy(p.grad).any()) for p in self._parameters):
            raise ValueError(_CHANGED if self._roots else _ASSIGNED)
        self._roots, self._create_graph, self._stale = [], False, False
        for p in self._parameters:
            p.grad = None
        self._left = self._gradients()


_CHANGED = (
    "closure changed .grad other than by backward(), by clipping or scaling for instance; products and trial losses "
    "would be those of another function. Leave it out: max_step_norm of the optimizer bounds the length of a step in "
    "place of clipping, a factor belongs in the loss, and parameters are held fixed by requires_grad=False."
)
_ASSIGNED = (
    "closure gave .grad values other than by backward() in its own thread, as by torch.autograd.grad and p.grad = g: "
    "which function they are the gradient of is not known, and products and trial losses need it. Return the loss and "
    "leave .grad alone, since a step takes the gradient itself; or call loss.backward()."
)
_EMPTIED = (
    "closure called backward() on what it returns, and emptied .grad afterwards: neither the gradient nor the graph is "
    "there any more. Call zero_grad() before backward(), or leave both out."
)
_ACCUMULATED = (
    "closure calls backward() without zero_grad(), and .grad holds a gradient from before the step: that of earlier "
    "batches, whose loss the step cannot evaluate. Evaluate all batches in one closure, with a backward() each "
    "(accumulate_grad_batches=1), or call zero_grad() if the gradient is left over."
)


def parsed(
    roots: Any,
    weights: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    *rest: Any,
    **named: Any,
) -> tuple[list[Root], bool, Sequence[Tensor] | None, bool]:
    """Roots, ``create_graph`` and ``inputs`` of a call of ``backward``, and whether it leaves graphs in place."""
    roots = named.get("self", named.get("tensors", roots))
    weights = next((named[k] for k in ("gradient", "grad_tensors") if k in named), weights)
    inputs = named.get("inputs", rest[-1] if rest else None)
    tensors = [roots] if isinstance(roots, Tensor) else list(roots)
    given = [weights] * len(tensors) if weights is None or isinstance(weights, Tensor) else list(weights)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("backward() was called on an edge of the graph, which has no value. Call it on the tensor.")
    if inputs is not None:
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    roots = [Root(plain(t), None if w is None else plain(w)) for t, w in zip(tensors, given, strict=True)]
    return roots, create_graph, inputs, create_graph if retain_graph is None else retain_graph


def number(value: Any) -> Tensor | None:
    """A number, or a tensor with one entry, as a detached 0-dim tensor; None for anything else."""
    if isinstance(value, Tensor) and (value := plain(value)).numel() == 1:
        return plain_copy(value).reshape(())
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else None


def scalar(loss: Any) -> Tensor:
    """``loss`` as a 0-dim tensor; raises if it is none."""
    loss = plain(loss) if isinstance(loss, Tensor) else loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
        remedy = "Reduce it, for instance with .mean(), and return it" if isinstance(loss, Tensor) else _remedy(loss)
        raise ValueError(f"closure returned {got}; a step needs the loss, a tensor with one entry. {remedy}.")
    if loss.is_complex():
        raise ValueError(
            f"closure returned a loss of dtype {loss.dtype}; a loss is real. Return loss.real or loss.abs()."
        )
    if not loss.is_floating_point():
        raise ValueError(
            f"closure returned a loss of dtype {loss.dtype}, which has no derivative. Return the loss before it is "
            "rounded or counted, such as a mean of squares."
        )
    return loss.reshape(())


def _remedy(loss: Any) -> str:
    if isinstance(loss, (dict, tuple, list)) or hasattr(loss, "loss"):
        return "Return the loss alone, such as outputs['loss'] or outputs[0], or call backward() on it"
    return (
        "Return it, or call backward() on it in the closure. A framework whose step() was called without a closure may "
        "have passed on an empty one: call step(closure)"
    )
