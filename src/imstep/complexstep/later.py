"""Backward passes through a graph that an arithmetic has left behind, after the evaluation.

What a checkpoint runs again must run as it did in the evaluation: by the same simple operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from imstep.complexstep.gradients import PASSES, grad, in_sight_of, leaves
from imstep.complexstep.kernels import STEERED, plain_attention, steer
from imstep.complexstep.report import Ledger


class _Later(TorchFunctionMode):
    """Steers as the arithmetic did, and sees where a Function calls ``backward()`` in its own.

    Args:
        whole: whether the gradients must hold what such calls add to ``.grad``, which they do not.
        steers: see :func:`later_grad`.
    """

    def __init__(self, whole: bool, steers: bool = True) -> None:
        super().__init__()
        self._whole, self._steers = whole, steers
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._steers and func in STEERED:
            return steer(func, args, kwargs, Ledger())
        if func in PASSES and func is not torch.autograd.grad:
            self._note([t for t in tree_leaves((args[:1], kwargs)) if isinstance(t, Tensor)])
        return func(*args, **kwargs)

    def _note(self, outputs: Sequence[Tensor]) -> None:
        if self._whole:
            raise ValueError(
                "a Function calls backward() within its own backward pass, as reversible networks do; what that adds "
                "to .grad is out of reach of the rows of a Jacobian. Call torch.autograd.grad there and return the "
                "gradients of the parameters, or use an optimizer that needs no residuals."
            )
        for t in leaves(outputs):
            self._before.setdefault(id(t), (t, t.grad))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for t, g in self._before.values():
            t.grad = g


@contextmanager
def as_evaluated() -> Iterator[None]:
    """A context in which what a checkpoint runs again for the sake of saved tensors runs as in the evaluation."""
    with plain_attention(), _Later(whole=False):
        yield


def later_grad(
    outputs: Tensor | Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    weights: Sequence[Tensor] | None = None,
    keep: bool = True,
    whole: bool = False,
    steered: bool = True,
) -> tuple[Any, ...]:
    """:func:`torch.autograd.grad` after the evaluation; None for an input that the outputs do not depend on.

    Args:
        weights: of the outputs.
        keep: whether the graph is kept.
        whole: whether to refuse where a Function's own ``backward()`` adds to ``.grad`` what belongs to a gradient;
            else that is left out.
        steered: whether the evaluation was one of an arithmetic, or :func:`as_evaluated`.

    Raises:
        ValueError: see ``whole``; a checkpoint allows one pass only.
    """
    try:
        with plain_attention(), _Later(whole, steered), in_sight_of(_Later):
            return grad(outputs, inputs, weights, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if "selective activation checkpoint" in str(error):
            raise ValueError(_SELECTIVE) from error
        raise


_SELECTIVE = (
    "the graph of the loss is gone through more than once, as for Kronecker factors, and a selective checkpoint (one "
    "with context_fn) can be gone through once only. Leave context_fn out, or take a preconditioning that looks at "
    "products alone, such as preconditioning=imstep.optim.Hutchinson()."
)
