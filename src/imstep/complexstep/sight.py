"""Whether a function computes in one thread: the modes that carry an arithmetic belong to the thread they are in.

Autograd's graph shows what other threads have made, and costs memory where none is needed otherwise. So it is asked for
only where there are other threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.errors import ComplexStepError
from imstep.complexstep.graph import survey


class Threads:
    """Notes, as a context, whether threads of Python's are there or begin; one may have a part in what runs within.

    Attributes:
        before: whether there are others to begin with.
        begun: whether one has begun within.
    """

    def __init__(self) -> None:
        self.before, self.begun = threading.active_count() > 1, False
        self._users: Any = None

    def __enter__(self) -> Threads:
        self._users = threading.getprofile()
        threading.setprofile(self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        threading.setprofile(self._users)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        """The first thing that a new thread calls."""
        self.begun = True
        sys.setprofile(self._users)


def traced(t: Tensor) -> Tensor:
    """``t``, a leaf, with a graph for :func:`refuse_threads` from here on; nobody asks for a gradient by it."""
    t._imstep_traced = True  # type: ignore[attr-defined]
    return t.requires_grad_()


def is_traced(leaf: Tensor) -> bool:
    """Whether ``leaf`` has a graph only because of :func:`traced`."""
    return hasattr(leaf, "_imstep_traced")


def refuse_threads(outputs: Sequence[Tensor], inputs: Sequence[Tensor], started: int, passes: bool) -> None:
    """Raise if part of the way from ``inputs`` to ``outputs`` was computed in another thread.

    Args:
        started: the number of the next node of autograd's graph when the function was called.
        passes: whether autograd has run within; on a GPU it makes nodes in threads of its own, which are in sight.
    """
    if passes and any(t.device.type != "cpu" for t in inputs):
        return
    numbers = range(started, torch.autograd._get_sequence_nr())
    if survey(outputs, inputs, numbers).foreign:
        raise ComplexStepError(
            "part of what the function returned was computed in another thread, out of sight of the arithmetic, so "
            "that its derivative would be missed. Evaluate it in the thread that asks for the derivative."
        )
