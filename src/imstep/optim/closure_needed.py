"""What a step says that is called without its closure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from imstep.uncompiled import uncompiled

_Step = TypeVar("_Step", bound=Callable[..., Any])


def needs_closure(step: _Step) -> _Step:
    """A step that says what it needs where it is called without its closure, and that compiled code calls as it is."""

    @uncompiled
    @functools.wraps(step)
    def checked(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        closure = args[0] if args else kwargs.get("closure")
        # A list holds the pieces of a batch; what is in it is looked at where it is taken apart.
        if not callable(closure) and not isinstance(closure, (list, tuple)):
            name, got = type(self).__name__, "nothing" if closure is None else f"a {type(closure).__name__}"
            raise TypeError(
                f"{name}.step needs a closure that evaluates the model and returns the loss, since a step evaluates "
                f"it several times; got {got}. Call optimizer.step(closure) with such a function, as for "
                "torch.optim.LBFGS. For Hugging Face's Trainer and PyTorch-Ignite imstep.integrations does so. A "
                "torch.amp.GradScaler cannot pass one on: use autocast without it, with bfloat16."
            )
        return step(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
