"""Whether parameters lie in memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_REMEDY = (
    "Tie weights by using one parameter in both places, as in decoder.weight = encoder.weight, which then counts once; "
    "or give each memory of its own, by nn.Parameter(w.detach().clone())."
)


@dataclass(frozen=True, eq=False)
class _Window:
    """Where the entries of a tensor are: from the byte ``start`` to before the byte ``end``."""

    tensor: Tensor
    name: str
    start: int
    end: int


def check_apart(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise where an entry of parameters lies in the memory of another one, or in none.

    Raises:
        ValueError: two of them share memory, one shows the same memory as several entries, is on the meta device,
            or was made under inference mode.
    """
    for t, name in zip(tensors, names, strict=True):
        if t.is_meta:
            raise ValueError(
                f"parameter {name} has no memory yet (device meta), and no numbers. Call model.to_empty(device=...), "
                "and load or initialise the model, before it is trained or differentiated."
            )
        if t.is_inference():
            raise ValueError(
                f"parameter {name} was made under torch.inference_mode(), and PyTorch neither differentiates nor "
                "overwrites it. Make the model outside of it, or give it parameters of its own there, by "
                "nn.Parameter(w.clone())."
            )
    windows = sorted(_windows(tensors, names), key=lambda w: w.start)
    near: list[_Window] = []  # whose ends overlap one after the other
    for window in windows:
        if near and window.start >= max(w.end for w in near):
            _check(near)
            near = []
        near.append(window)
    _check(near)


def check_still_apart(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """As :func:`check_apart`, at little cost where none has another's storage."""
    if len({t.untyped_storage()._cdata for t in tensors}) < len(tensors):
        check_apart(tensors, names)


def check_others(others: Sequence[Tensor], tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise where one of ``others``, which are not trained or not given, lies in the memory of parameters that are."""
    if not others:
        return
    with torch._C.DisableTorchFunction():
        memory = {t.untyped_storage()._cdata for t in tensors}
        for other in others:
            if other.layout is torch.strided and other.untyped_storage()._cdata in memory:
                check_apart([*tensors, other], [*names, "another, frozen or not given,"])


def _windows(tensors: Sequence[Tensor], names: Sequence[str]) -> list[_Window]:
    """Those of tensors that have memory, which meta, fake and sharded ones have not."""
    found = []
    for t, name in zip(tensors, names, strict=True):
        if t.numel() == 0 or t.untyped_storage().device.type == "meta" or t.data_ptr() == 0:
            continue
        if _folded(t):
            raise ValueError(
                f"parameter {name} has several entries at one place in memory, as w.expand(...) does, and no step can "
                "move them apart. Make a parameter of w, and expand it in the closure; or give each entry memory of "
                "its own, by nn.Parameter(w.detach().clone())."
            )
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        found.append(_Window(t, name, t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return found


def _folded(t: Tensor) -> bool:
    """Whether two entries of ``t`` are one in memory."""
    reach, steps = 0, sorted((step, n) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1)
    suspect = False
    for step, n in steps:
        suspect |= step <= reach
        reach += (n - 1) * step
    return suspect and len(torch.arange(reach + 1).as_strided(t.shape, t.stride()).unique()) < t.numel()


def _check(near: Sequence[_Window]) -> None:
    """Raise if entries of two windows are one in memory; strided ones may lie between each other's."""
    at = _taken(near)
    if at is not None:
        other = next(window for window in near[:at] if _taken([window, near[at]]) is not None)
        raise ValueError(
            f"parameters {other.name} and {near[at].name} share memory, as w and nn.Parameter(w.data) do: derivatives "
            f"by one would miss the other, and a step would move what they share twice. {_REMEDY}"
        )


def _taken(near: Sequence[_Window]) -> int | None:
    """The number of the first window that shares an entry with an earlier one."""
    if len(near) < 2:
        return None
    first = min(window.start for window in near)
    taken = torch.zeros(max(window.end for window in near) - first, dtype=torch.bool)
    for number, window in enumerate(near):
        size, t = window.tensor.element_size(), window.tensor
        strides = [*(step * size for step in t.stride()), 1]
        own = taken.as_strided([*t.shape, size], strides, window.start - first)
        if bool(own.any()):
            return number
        own.fill_(True)
    return None
