"""Constants of a closure that lie in the memory of parameters, and move with them.

``w = nn.Parameter(x0)`` gives w the memory of x0, as ``x0 = w.detach()`` gives x0 that of w. A closure that computes
with both is another function than its derivatives tell of, which take x0 for a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from imstep.complexstep.islands import unseen

_ALONE = 2
"""References to memory that only one tensor shows: the tensor's, and that of the storage in Python."""

_NUMBERS = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__", "__complex__"}


def refusing_outsiders(tensors: Sequence[Tensor], names: Sequence[str]) -> AbstractContextManager[Any]:
    """A context for a call of the closure; raises within where it uses constants in the memory of ``tensors``.

    Cost: where nothing but the tensors shows their memory, as mostly, a look at the references to it.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return nullcontext()
    with unseen():
        found = {_memory(t): name for t, name in zip(tensors, names, strict=True) if _is_plain(t)}
        shared = any(count(memory) > _ALONE for memory in found)
    return _Refusing(found, tensors) if shared else nullcontext()


class _Refusing(TorchFunctionMode):
    """Watches calls for tensors that were made before, without a graph, in the memory of parameters.

    Args:
        memory: the names of parameters, by their memory.
        tensors: the parameters.
    """

    def __init__(self, memory: dict[int, str], tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._memory = memory
        self._own = {id(t): t for t in tensors}  # and what the closure makes of them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:
            return results  # what a backward pass is given was made within
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        looks = not made and getattr(func, "__name__", "") not in _NUMBERS  # at a form
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith("imstep.")  # with views made out of sight
        for t in [] if looks or ours else tree_leaves((args, kwargs)):
            self._check(t)
        with unseen():
            self._own |= {id(t): t for t in made if _is_plain(t) and _memory(t) in self._memory}
        return results

    def _check(self, t: Any) -> None:
        if not isinstance(t, Tensor) or id(t) in self._own:
            return
        with unseen():
            name = None if t.requires_grad or not _is_plain(t) else self._memory.get(_memory(t))
        if name is not None:
            raise ValueError(
                f"closure uses a tensor of shape {tuple(t.shape)} that was made outside of it and lies in the memory "
                f"of parameter {name}, as w.detach(), w.data and the x0 of nn.Parameter(x0) do: it moves with the "
                "parameter, and is a constant for derivatives. Keep a copy, as x0.clone(), or make it in the closure."
            )


def _is_plain(t: Tensor) -> bool:
    """Whether ``t`` has memory of its own kind: neither a subclass, nor within a function transform."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not wrapped(t) and t.numel() > 0


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata
