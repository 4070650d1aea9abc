"""Derivatives that do not exist: a word for each operator, once, where the direction leads to them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from imstep.callers import users_level
from imstep.complexstep.errors import NotDifferentiableWarning
from imstep.complexstep.report import Ledger
from imstep.complexstep.tape import Tape
from imstep.complexstep.vanishing import Root


class Missing:
    """What is said of points without a derivative in one evaluation.

    Args:
        ledger: where they are entered.
        reason: of the message, after the name of the operator; the remedy included.
    """

    def __init__(self, ledger: Ledger, reason: str) -> None:
        self._ledger, self._reason = ledger, reason
        self._warned: set[OpOverload] = set()

    def lose(self, root: Root) -> None:
        """``root`` leaves the result without a derivative; a word if the direction leads away from it."""
        root.lost = True
        if root.moves and root.operator not in self._warned:
            self._warned.add(root.operator)
            self._warn(root)

    def conclude(self, lost: Sequence[Root], tape: Tape | None) -> None:
        """Nothing more is evaluated: a word on each that was lost, in the direction or, on a tape, in a random one."""
        pending = [root for root in lost if root.moves is None]
        if tape is not None and pending:
            _probe(pending, tape)
        for root in lost:
            self.lose(root)

    def _warn(self, root: Root) -> None:
        self._ledger.mark(root.operator)
        text = f"{root.operator} {self._reason}"
        if root.place is None:
            warnings.warn(text, NotDifferentiableWarning, stacklevel=users_level())
        else:
            file, line, registry = root.place
            warnings.warn_explicit(text, NotDifferentiableWarning, file, line, registry=registry)


def _probe(roots: Sequence[Root], tape: Tape) -> None:
    """Along a random direction, which of the roots move."""
    with _disable_current_modes(), torch.no_grad():
        watched = [root.references for root in roots]
        flat = [reference for references in watched for reference in references if reference is not None]
        parts = iter(tape.watching(flat).replay(tape.probe(roots[0].vanishes.device))[-len(flat) :])
        for root, references in zip(roots, watched, strict=True):
            root.look([None if reference is None else next(parts) for reference in references])


def depends(t: Tensor, part: Tensor | None) -> bool:
    """Whether a result changes with what has this part in it, by more than rounding."""
    if part is None or t.numel() == 0:
        return False
    rounding = 10 * torch.finfo(t.dtype).eps * t.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return not bool((part.abs() <= rounding).all())
