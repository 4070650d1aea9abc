"""What the engine refuses, with the reason and the remedy."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

REPORT = "Please report the operator; CONTRIBUTING.md shows how a rule is added."
OWN = (
    "It is an operator of your own, or of another package: write a rule for it, as docs/extending.md shows, or compute "
    "the same with torch functions."
)
DENSE = "Use dense tensors; for gradients of embeddings, sparse=False."
NESTED = "Use dense tensors: sequences padded to one length, with a mask."
COLLECTIVE = (
    "Let a closure return the loss of its own process's part of the batch, and give process_group= to NewtonKrylov or "
    "to an operator's over(), which form the sums. Where it needs others' tensors, as for a contrastive loss, "
    "torch.distributed.nn.functional.all_reduce, all_gather, reduce_scatter and broadcast, and SyncBatchNorm, have "
    "derivatives in a step of NewtonKrylov(..., process_group=...)."
)
MOVED = (
    "a tensor that is being differentiated was given other memory, and its imaginary part would stay behind.",
    "Do that before the closure is called, or write the values over the old ones: with torch.no_grad(): t.copy_(...).",
)
CONTROL = (
    "Write it in Python: if, for and while, or torch.vmap and operators on whole tensors; in place of flex_attention "
    "take scaled_dot_product_attention."
)
COLD = (
    "PyTorch's compiler, which torch.cond and its like take too, was loaded within the function and cannot run there.",
    "Compile before, or import torch._dynamo; then what is compiled runs uncompiled while it is differentiated.",
)
_LIBRARY = str(Path(__file__).resolve().parents[1])


class ComplexStepError(RuntimeError):
    """An imaginary part would have been lost or is not defined."""


class UnsupportedOperatorError(ComplexStepError, NotImplementedError):
    """An operator has neither a rule nor a decomposition for complex-step numbers."""

    def __init__(self, operator: object, reason: str, remedy: str) -> None:
        self.operator = str(operator)
        where = user_line()
        at = f" (called from {where})" if where else ""
        super().__init__(f"{self.operator}{at}: {reason} {remedy}")


class NotDifferentiableWarning(UserWarning):
    """A derivative that does not exist was asked for and is taken to be zero."""


def user_line() -> str | None:
    """The innermost line on the stack that is neither PyTorch's nor this library's, nor a context's on the way."""
    place = user_place()
    return None if place is None else f"{place[0]}:{place[1]}"


def user_place() -> tuple[str, int, dict[Any, Any]] | None:
    """The file and the number of that line, and where warnings that were given for it are remembered."""
    frame = sys._getframe(1)
    torch_home = str(Path(sys.modules["torch"].__file__ or "").resolve().parent)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_LIBRARY, torch_home, contextlib.__file__, "<")):
            return name, frame.f_lineno, frame.f_globals.setdefault("__warningregistry__", {})
        frame = frame.f_back  # type: ignore[assignment]
    return None
