"""What one evaluation has shown of a loss at a point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from imstep.complexstep.loss_split import LossSplit
from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import Tape
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty

_Matrix = TypeVar("_Matrix")
_Observer = TypeVar("_Observer")


@dataclass(frozen=True, eq=False)
class Linearisation:
    """Loss and gradient at a point, and the tape of the gradient's derivative there.

    Attributes:
        loss: 0-dim tensor; with its graph if the evaluation was to keep it.
        gradient: (n,).
        tape: maps a direction, given per parameter, to the Hessian product, per parameter.
        split: the loss as a convex function of outputs; None where it has another form.
        report: tells the operators that the evaluation met.
        penalty: what is added to the closure's loss, in ``loss`` and ``gradient``, not in the tape; None for nothing.
        keeps_graph: whether a backward pass must leave the loss's graph to others.
        piece: which piece of a batch it is of.
    """

    loss: Tensor
    gradient: Tensor
    tape: Tape
    split: LossSplit | None
    report: Callable[[], OperatorReport]
    penalty: Penalty | None = None
    keeps_graph: bool = False
    piece: int = 0
    repeats: ClassVar[float] = 0.0
    """The share of the batch that every product evaluates anew."""

    @property
    def convex(self) -> bool:
        """Whether the loss is a convex function of outputs."""
        return self.split is not None

    @property
    def static(self) -> bool:
        """Whether the evaluation has repeated the structure of an earlier one."""
        return self.tape.static

    def matrix(
        self,
        parameters: ParameterVector,
        build: Callable[[Linearisation], _Matrix],
        definite: bool,
        graph: bool = False,
    ) -> _Matrix:
        """What ``build`` reads off the record; ``graph``: and off the loss's graph."""
        return build(self)

    def evaluations(self, observer: _Observer) -> Iterator[tuple[float, Linearisation, _Observer]]:
        """The evaluations that the loss is a weighted sum of, each with its observer: this one."""
        yield 1.0, self, observer
