"""A curvature matrix of a function on one batch: recorded where there is room for the record, else recomputed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import TapeChangedError, TapeTooLargeError
from imstep.curvature.frozen import Closure, FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.products import Products, RecomputedProducts
from imstep.curvature.repeating import require_unchanged


@dataclass(frozen=True, eq=False)
class Point:
    """What one evaluation shows.

    Attributes:
        loss: 0-dim tensor.
        gradient: (n,).
        source: products with the matrix.
        definite: whether the matrix is known to be positive semidefinite.
        report: tells the operators that the evaluation met.
        recomputes: why there is no record, a sentence; None if there is one.
    """

    loss: Tensor
    gradient: Tensor
    source: Products
    definite: bool
    report: Callable[[], OperatorReport]
    recomputes: str | None = None


class BatchCurvature(ABC):
    """A curvature matrix of a function on one batch, at whatever the parameters are.

    Args:
        closure: returns the loss.
        parameters: the vector that is differentiated.

    Attributes:
        frozen: the closure on its batch.
    """

    def __init__(self, closure: Closure, parameters: ParameterVector) -> None:
        self.frozen, self.parameters = FrozenClosure(closure, parameters), parameters

    def once(self, memory_budget: int | None) -> Point:
        """:meth:`evaluate`, leaving random numbers and buffers as one evaluation does.

        Raises:
            ValueError: the budget is negative.
        """
        try:
            return self.evaluate(checked_budget(memory_budget))
        finally:
            self.frozen.leave(accepted=True)

    def evaluate(self, memory_budget: int | None) -> Point:
        """Loss, gradient and products; without a record where it would take more than ``memory_budget`` bytes."""
        try:
            return self.record(memory_budget)
        except (TapeTooLargeError, TapeChangedError) as error:
            self.frozen.undo(error)
            return self.without_record(str(error))

    @abstractmethod
    def record(self, memory_budget: int | None) -> Point:
        """The first evaluation, with a record.

        Raises:
            TapeTooLargeError: it takes more than ``memory_budget`` bytes.
            TapeChangedError: the closure overwrote what it needs.
        """

    @abstractmethod
    def without_record(self, reason: str) -> Point:
        """The first evaluation, without a record."""

    @abstractmethod
    def loss_and_product(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (0-dim) and the product (n,) with ``direction`` (n,), by an evaluation of its own."""

    def recomputed(self, loss: Tensor, gradient: Tensor, definite: bool, reason: str) -> Point:
        """A point whose products are each an evaluation that leaves no trace."""

        def product(direction: Tensor) -> Tensor:
            with self.frozen.aside():
                now, image = self.loss_and_product(direction)
            require_unchanged(loss, now)
            return image

        self.frozen.doubt()
        source = RecomputedProducts(product, self.parameters, self.parameters)
        note = f"every product evaluates the closure anew: {reason}"
        return Point(loss, gradient, source, definite, lambda: replace(self.frozen.report, note=note), reason)


def checked_budget(memory_budget: int | None) -> int | None:
    """``memory_budget``; raises if it is negative."""
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget must be None or at least 0 bytes, got {memory_budget}.")
    return memory_budget
