"""Derivatives in PyTorch that are differentiated no further, though they seem to be.

What a second backward pass makes of layer and batch normalisation takes mean and deviation for constants, and so does
what forward mode makes of them. Both are right, and their derivatives by the parameters are not. A look-up that scales
gradients by frequencies has the gradient of no function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.graph import walk

_NODES = {
    "NativeLayerNormBackwardBackward": "layer_norm",
    "NativeBatchNormBackwardBackward": "batch_norm",
    "CudnnBatchNormBackwardBackward": "batch_norm",
    "MiopenBatchNormBackwardBackward": "batch_norm",
    "BatchNormBackwardBackward": "batch_norm",
}
"""By the node of their backward pass, without its number."""

NORMS = {F.layer_norm, F.batch_norm, F.instance_norm, torch.layer_norm, torch.batch_norm, torch.instance_norm}
_FLAG = 5
"""Where a call says whether statistics are those of its input."""

_BY_FREQUENCY = {F.embedding: 5, F.embedding_bag: 5, torch.embedding: 3, torch.embedding_bag: 3}
"""Where a look-up says whether it scales its gradient."""

SUSPECTS = {*NORMS, *_BY_FREQUENCY}
"""Functions whose calls :func:`refusal` looks at."""

_CREATE_GRAPH = {"grad": 4, "backward": 3}
"""Where a pass takes ``create_graph``, by the name of its function."""

_functorch = torch._C._functorch


def refusal(func: Any, args: Any, kwargs: Any) -> UnsupportedOperatorError | None:
    """Why the gradient of what a call makes would be wrong; None where it would not.

    Args:
        func: one of :data:`SUSPECTS`, ``torch.autograd.grad`` or ``backward``, with its arguments.
    """
    if func in _BY_FREQUENCY:
        return _of_look_up(func, args, kwargs)
    return _of_call(func, args, kwargs) if func in NORMS else _of_pass(func, args, kwargs)


def _of_look_up(func: Any, args: Any, kwargs: Any) -> UnsupportedOperatorError | None:
    """A look-up whose rows have gradients that are divided by how often they are looked up."""
    at = _BY_FREQUENCY[func]
    scaled = kwargs.get("scale_grad_by_freq", args[at] if len(args) > at else False)
    if not (scaled and any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values()))):
        return None
    return UnsupportedOperatorError(
        func.__name__,
        "with scale_grad_by_freq=True what it passes back is the gradient of no function, and has no Hessian or "
        "Jacobian.",
        "Leave scale_grad_by_freq out; a step by curvature accounts for how often a row is looked up.",
    )


def _of_pass(func: Any, args: Any, kwargs: Any) -> UnsupportedOperatorError | None:
    """A backward pass that goes through that of a normalisation, and is to be differentiated."""
    at = _CREATE_GRAPH[func.__name__]
    if not kwargs.get("create_graph", args[at] if len(args) > at else False):
        return None
    roots = args[0] if args else kwargs.get("outputs", kwargs.get("tensors", ()))
    for node in walk(t.grad_fn for t in ([roots] if isinstance(roots, Tensor) else roots) if isinstance(t, Tensor)):
        norm = _NODES.get(node.name().rstrip("0123456789"))
        if norm is not None and getattr(node, "_saved_train", getattr(node, "_saved_training", True)):
            return _wrong(norm, "second derivatives by its inputs by two backward passes")
    return None


def _of_call(func: Any, args: Any, kwargs: Any) -> UnsupportedOperatorError | None:
    """A normalisation within forward mode."""
    default = func is F.instance_norm or "layer" in func.__name__
    own = kwargs.get("training", kwargs.get("use_input_stats", args[_FLAG] if len(args) > _FLAG else default))
    if ("layer" in func.__name__ or own) and _is_dual(args[0] if args else kwargs["input"]):
        return _wrong(func.__name__, "derivatives by its inputs by forward mode, as of torch.func.jvp and hessian,")
    return None


def _is_dual(t: Any) -> bool:
    """Whether a tensor has a tangent; beneath other transforms, whether it may have one."""
    stack = _functorch.get_interpreter_stack() or []
    jvps = [i.level() for i in stack if i.key() == _functorch.TransformType.Jvp]
    if not jvps or stack[-1].level() == jvps[-1]:
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t, level=0).tangent is not None
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.maybe_get_level(t) in jvps:
            return True
        t = _functorch.get_unwrapped(t)
    return False


def _wrong(norm: str, derivatives: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        norm,
        f"{derivatives} have wrong derivatives in PyTorch, which takes mean and deviation for constants there, so that "
        "the gradient of the loss is wrong.",
        "Take derivatives by the inputs by imstep.pde, or first ones by torch.autograd.grad, or write the "
        "normalisation with mean() and var().",
    )
