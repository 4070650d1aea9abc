"""A point of which loss and gradient are known, and that is recorded once a product is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.products import Products

if TYPE_CHECKING:
    from imstep.curvature.pieces import FrozenBatch, JointLinearisation, Linearisation
    from imstep.curvature.shared import SharedLinearisation


class DeferredLinearisation:
    """Loss and gradient at a point by a plain evaluation; the record follows where something needs it.

    Args:
        frozen: the closure on its batch. The parameters must be those of the point when the record is made.

    Attributes:
        loss, gradient, penalty: as of a :class:`Linearisation`.
        made: how many records were made: 0 or 1.
    """

    repeats: ClassVar[float] = 0.0

    def __init__(self, frozen: FrozenBatch) -> None:
        self._frozen = frozen
        self.loss, self.gradient = frozen.watched_gradient()
        self.penalty = frozen.penalty
        self.made = 0
        self._record: Linearisation | JointLinearisation | SharedLinearisation | None = None

    @property
    def recorded(self) -> Linearisation | JointLinearisation | SharedLinearisation:
        """The record, made at the first call."""
        if self._record is None:
            self._record, self.made = self._frozen.linearise(), 1
        return self._record

    @property
    def static(self) -> bool:
        """Whether a record was made, and its evaluation has repeated the structure of an earlier one."""
        return self._record is not None and self._record.static

    @property
    def convex(self) -> bool:
        """Whether the loss is a convex function of outputs."""
        return self.recorded.convex

    def matrix(
        self, parameters: ParameterVector, build: Callable[..., Any], definite: bool, graph: bool = False
    ) -> SymmetricOperator:
        """What ``build`` reads off the record, once it is multiplied."""
        source = _DeferredProducts(parameters, lambda: self.recorded.matrix(parameters, build, definite, graph))
        return SymmetricOperator(parameters, source, definite)

    def evaluations(self, observer: Any) -> Iterator[tuple[float, Linearisation, Any]]:
        """The evaluations that the loss is a weighted sum of, each with its observer."""
        return self.recorded.evaluations(observer)


class _DeferredProducts(Products):
    """Products with a matrix that is built at the first of them."""

    def __init__(self, parameters: ParameterVector, build: Callable[[], SymmetricOperator]) -> None:
        super().__init__(parameters, parameters)
        self._build = build
        self._matrix: SymmetricOperator | None = None

    def one(self, direction: Tensor) -> Tensor:
        return self._built().matvec(direction)

    def several(self, directions: Tensor) -> Tensor:
        return self._built().matmat(directions.mT).mT

    def _built(self) -> SymmetricOperator:
        self._matrix = self._matrix or self._build()
        return self._matrix
