"""Products without a tape: each by an evaluation of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from imstep.complexstep.report import OperatorReport
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector


class RecomputedProducts:
    """Stands in for a :class:`~imstep.complexstep.tape.Tape` where one cannot be kept.

    Args:
        frozen: the closure on its batch.
        parameters: the vector that is differentiated.
        reason: why there is no tape, a sentence.

    Cost: no memory between products; about three gradients and a closure's evaluation for each.
    """

    replays_blocks = False
    nbytes = largest = 0

    def __init__(self, frozen: FrozenClosure, parameters: ParameterVector, reason: str) -> None:
        self._frozen, self._parameters, self.reason = frozen, parameters, reason

    def replay(self, directions: Iterable[Tensor]) -> list[Tensor | None]:
        """The derivative of the gradient along ``directions``, one per parameter; leaves no trace of the evaluation."""
        with self._frozen.aside():
            product = self._frozen.product(self._parameters.flatten(list(directions)))
        return list(self._parameters.unflatten(product))

    def check(self) -> None:
        """Nothing is held that could have changed."""

    @property
    def report(self) -> OperatorReport:
        """The operators that the last product met, with the reason."""
        return replace(self._frozen.report, note=f"every product evaluates the closure anew: {self.reason}")
