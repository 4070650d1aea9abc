"""What the user's hooks make of the tensors that autograd saves: it must not lose the imaginary part."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.tensor import Plane


def checked_hooks(plane: Plane) -> AbstractContextManager[Any]:
    """The user's hooks on saved tensors once more, such that what comes back without its imaginary part is noticed."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", None) == checkpoint.__name__:  # a checkpoint computes it again
        return nullcontext()
    pack, unpack = hooks

    def packed(t: Tensor) -> tuple[bool, Any]:
        return plane.find(t) is not None, pack(t)

    def unpacked(held: tuple[bool, Any]) -> Tensor:
        t: Tensor = unpack(held[1])
        if held[0] and plane.open and plane.find(t) is None:  # later passes through the graph want values alone
            raise UnsupportedOperatorError(
                "saved_tensors_hooks",
                "what the hooks return for a tensor that is being differentiated comes from outside PyTorch, without "
                "its imaginary part.",
                "Keep saved tensors in PyTorch, as save_on_cpu() and checkpoints do, or leave the hooks out.",
            )
        return t

    return saved_tensors_hooks(packed, unpacked)
