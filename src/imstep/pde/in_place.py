"""Functions in place: what is written is seen by the tensor, by what it is a view of, and by that one's other views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.pde.jet import NOT_IN_PLACE, ExpansionError, Jet, broadcast, rule

_FORM = {
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "resize_", "resize_as_"),
    *("set_", "requires_grad_", "detach_", "share_memory_", "rename_", "apply_", "map_", "map2_"),
}
"""What changes a tensor, but not its entries by a function of PyTorch."""
_DRAWN = {
    *("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"),
}


@rule("in place")
def _in_place(name: str, func: Any, args: Any, kwargs: Any) -> Jet | None:
    """A function in place; ``func`` if its name does not end with a mark, but does so for this call."""
    target, plain = args[0], name.rstrip("_")
    if not isinstance(target, Jet):
        raise ExpansionError(f"{name} writes a tensor that carries derivatives over another. {NOT_IN_PLACE}")
    if name in _FORM:
        raise ExpansionError(
            f"{name} is not possible on a tensor that carries derivatives. Use functions that are not in place, such "
            "as .transpose(), .squeeze() or .detach(); points of a field need no requires_grad_()."
        )
    if name == "__setitem__":
        _write(target, lambda t: t[args[1]], args[2])
        return None
    whole = lambda t: t
    if name in _DRAWN:
        return _write(target, whole, getattr(torch.empty_like(target.value), name)(*args[1:], **kwargs))
    if name in ("copy_", "fill_", "zero_"):
        return _write(target, whole, args[1] if len(args) > 1 else kwargs.get("value", kwargs.get("src", 0)))
    function = func if name == plain else _found(plain)
    if function is None:
        raise ExpansionError(f"{name} changes a tensor that carries derivatives in place. {NOT_IN_PLACE}")
    result = function(*args, **kwargs)
    if not isinstance(result, Jet):
        raise ExpansionError(f"{name} would leave a tensor without its derivatives. Use {plain}, not in place.")
    if result.shape != target.shape:
        raise ExpansionError(f"an in-place function would change the shape of a {tuple(target.shape)} tensor.")
    if target.base is target and result.dtype == target.dtype:
        target.overwrite(result.value, result.first, result.second)
        return target
    return _write(target, whole, result)


def _found(name: str) -> Callable[..., Any] | None:
    found = (getattr(place, name, None) for place in (Tensor, torch, F))
    return next((function for function in found if callable(function)), None)


def _write(target: Jet, part: Callable[[Tensor], Tensor], content: Any) -> Jet:
    """``content`` over a part of a jet."""
    base, own = target.base, target.base.value
    if _kind(target.value) != _kind(own):
        raise ExpansionError(
            "a tensor that carries derivatives is changed in place by a view of another kind, such as its real part or "
            f"its conjugate. {NOT_IN_PLACE}"
        )
    if not own.is_complex() and (content.is_complex() if isinstance(content, Tensor) else isinstance(content, complex)):
        raise ExpansionError("complex numbers are written into a real tensor. Call .to(torch.complex128) on it before.")
    places = torch.empty_strided(own.shape, own.stride(), dtype=torch.int64, device=own.device)
    places.copy_(torch.arange(own.numel(), device=own.device).view(own.shape))
    places = part(target.look(places).long())  # .to() and the like make numbers of another kind of them
    if places.unique().numel() < places.numel():
        raise ExpansionError(f"an in-place function would write an entry twice, as .expand() shows it. {NOT_IN_PLACE}")
    value, first, second = _spread(content, places.shape, base)
    if base.second is None and second is None:
        bends = None
    else:
        zeros = lambda shape: own.new_zeros(base.combination.rows, *shape)
        old, new = (zeros(shape) if t is None else t for t, shape in ((base.second, own.shape), (second, places.shape)))
        bends = _over(old, places, new)
    base.overwrite(_over(own, places, value), _over(base.first, places, first), bends)
    return target


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.is_conj(), t.is_neg()


def _spread(content: Any, shape: torch.Size, base: Jet) -> tuple[Tensor, Tensor, Tensor | None]:
    """The parts of what is written, in the shape and kind of what it is written over."""
    own = base.value
    if not isinstance(content, Jet):
        value = torch.as_tensor(content, dtype=own.dtype, device=own.device).expand(shape)
        return value, own.new_zeros(len(base.first), *shape), None
    value = content.value.to(own.dtype).expand(shape)
    first = broadcast(content.first, value).to(own.dtype)
    return value, first, None if content.second is None else broadcast(content.second, value).to(own.dtype)


def _over(old: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """``new`` (..., *places.shape) in these places of ``old`` (..., *shape), which are counted entry by entry."""
    lead = old.shape[: new.dim() - places.dim()]
    written = old.reshape(*lead, -1).index_copy(len(lead), places.flatten(), new.reshape(*lead, -1)).view(old.shape)
    return written if old.is_contiguous() else torch.empty_like(old).copy_(written)
