"""Derivatives inside a function that is differentiated itself: what they must not lose.

Forward over anything is nesting: the outer arithmetic sees the operators of the inner one, and :func:`jvp` of
:func:`hvp` is a third derivative. Backward is not: imaginary parts come about below autograd, so no graph leads
from a product back to what it depends on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from imstep.complexstep.dispatch import Dispatch
from imstep.complexstep.errors import ComplexStepError
from imstep.complexstep.gradients import leaves
from imstep.complexstep.sight import is_traced


def _around() -> list[Dispatch]:
    """The arithmetics that code runs in."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Dispatch)]


def is_nested() -> bool:
    """Whether code that runs now is differentiated itself."""
    return bool(_around())


def refuse_lost_graph(name: str, tensors: Iterable[Tensor], own: Iterable[Tensor] = ()) -> None:
    """Raise if a gradient that is taken further out would have to pass through a derivative.

    Args:
        name: of the function that takes the derivative.
        tensors: what the derivative depends on.
        own: leaves of its own, whose gradient nobody else takes.
    """
    around = _around()
    if not around or not torch.is_grad_enabled():
        return
    ignored = {id(t) for t in own}
    for leaf in leaves(tensors):
        if id(leaf) not in ignored and not is_traced(leaf) and any(mode.carries(leaf) for mode in around):
            raise ComplexStepError(
                f"imstep.{name} is called on what depends on the parameters of a loss whose gradient is taken; its "
                "result has no graph, so the gradient would lose that dependence. Write this derivative of the loss "
                "with torch.autograd.grad(..., create_graph=True) or torch.func, or take the outer one by imstep.jvp."
            )


def refuse_transforms(name: str, tensors: Iterable[Tensor], alone: bool) -> None:
    """Raise if a derivative is taken within a transform of ``torch.func``, or of dual numbers, that it depends on.

    Args:
        name: of the function that takes the derivative.
        tensors: what it is given.
        alone: whether it needs that there be no transform at all, as a backward pass does.
    """
    tensors, wrapped = list(tensors), torch._C._functorch.is_functorch_wrapped_tensor
    within = torch._C._functorch.maybe_current_level() is not None
    if within and (alone or any(wrapped(t.clone()) for t in tensors)):
        raise ComplexStepError(
            f"imstep.{name} is called within a transform of torch.func, such as vmap or grad, which hides the memory "
            "that imaginary parts lie beside. Call it outside of the transform: for several directions imstep.Hessian "
            "multiplies a block, H @ V, and functions of a batch take it as a whole; derivatives of derivatives are "
            "imstep.jvp around it, or torch.func alone."
        )
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors if forward_ad._current_level >= 0):
        raise ComplexStepError(
            f"imstep.{name} is called on dual numbers of torch.autograd.forward_ad, whose tangents would be lost: its "
            "result is no dual number. Take the outer derivative by imstep.jvp, or both by torch."
        )
