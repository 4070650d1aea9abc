"""A batch evaluated piece by piece: the sum of closures, of which one at a time is in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from imstep.curvature.closure import Closure
from imstep.curvature.deferred import DeferredLinearisation
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.layers import LayerObserver
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.products import Products, ShiftedProducts
from imstep.curvature.state import RandomState

if TYPE_CHECKING:
    from imstep.curvature.shared import SharedBatch, SharedLinearisation

Observer = TypeVar("Observer", LayerObserver, None)

Build: TypeAlias = Callable[[Linearisation], SymmetricOperator]
"""Reads a matrix off the record of a piece."""


@dataclass(frozen=True)
class Piece:
    """A part of a batch.

    Attributes:
        weight: how much its loss counts in the batch's, > 0.
        closure: returns its loss, or calls ``backward()`` on it.
        look: told the loss, or its parts, with their graphs, when it is evaluated first.
    """

    weight: float
    closure: Closure
    look: Callable[[Sequence[Tensor]], None] | None = None


class FrozenPieces:
    """f = Σ w_k f_k over the pieces of a batch, evaluated one after the other; the counterpart of `FrozenClosure`.

    A penalty is added to the sum, on the parameters that some piece depends on.

    Each piece is evaluated on the random numbers and buffers that the pieces before it have left in the first
    evaluation, so that f is one function.

    Args:
        pieces: at least one.
        parameters: the vector that is differentiated.
        stale, penalty: see :class:`FrozenClosure`.
        room: bytes that the records of pieces may take together; the others are recorded anew for every product.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        parameters: ParameterVector,
        stale: bool,
        penalty: Penalty | None,
        room: int | None,
    ) -> None:
        self._given, self._parameters, self._stale, self._room = list(pieces), parameters, stale, room
        self.penalty, self._settled = penalty, False
        self._frozen: list[FrozenClosure] = []
        self._repeats, self._doubted = 0, False

    # --- evaluations --------------------------------------------------------------------------------------------

    def linearise(
        self, observer: AbstractContextManager[Any] | None = None, keep_graph: bool = False
    ) -> JointLinearisation:
        """Loss and gradient, and the records that there is room for; observers come in at ``evaluations``."""
        room, total = math.inf if self._room is None else self._room, _Sum()
        records: list[Linearisation | None] = []
        convex: list[bool] = []
        for piece, frozen in self.each():
            at = frozen.linearise()
            total.add(piece.weight, at.loss, at.gradient)
            convex.append(at.convex)
            fits = at.tape.nbytes <= room
            room -= at.tape.nbytes if fits else 0
            records.append(at if fits else None)
            del at  # before the next piece takes its place
        loss, gradient = self._penalised(*total.terms)
        return JointLinearisation(loss, gradient, self, tuple(records), all(convex), self.penalty)

    def watched_gradient(self) -> tuple[Tensor, Tensor]:
        """As :meth:`gradient`, for a first evaluation without a record."""
        return self._penalised(*self._total(FrozenClosure.watched_gradient))

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and gradient (n,) at the current parameters."""
        return self._penalised(*self._total(FrozenClosure.gradient))

    def loss(self) -> Tensor:
        """The loss alone (0-dim) at the current parameters."""
        loss = self._total(lambda frozen: (frozen.loss(),))[0]
        return loss if self.penalty is None else loss + self.penalty.value(self._parameters.get())

    def product(self, direction: Tensor) -> Tensor:
        """The Hessian product with ``direction`` (n,), by an evaluation of its own."""
        product = self._total(lambda frozen: (frozen.product(direction),))[0]
        return product if self.penalty is None else product.addcmul_(self.penalty.factors, direction)

    def _penalised(self, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the sum and the penalty together."""
        if self.penalty is not None and not self._settled:
            self.take_penalty(self.penalty.within(self.used, self.hook_factors))
        if self.penalty is None:
            return loss, gradient
        w = self._parameters.get()
        return loss + self.penalty.value(w), gradient.addcmul_(self.penalty.factors, w)

    def _total(self, evaluate: Callable[[FrozenClosure], tuple[Tensor, ...]]) -> list[Tensor]:
        total = _Sum()
        for piece, frozen in self.each():
            total.add(piece.weight, *evaluate(frozen))
        return total.terms

    def each(self) -> Iterator[tuple[Piece, FrozenClosure]]:
        """The pieces in order, each in the state in which it was evaluated first."""
        again = len(self._frozen) == len(self._given)
        if again:
            self._rewind()
        for number, piece in enumerate(self._given):
            if not again:  # not before its turn: it begins where random numbers are now
                self._frozen.append(FrozenClosure(piece.closure, self._parameters, self._stale))
                self._frozen[-1].user.look = piece.look
                if self._doubted:
                    self._frozen[-1].doubt()
            self._parameters.weigh_piece(piece.weight)
            yield piece, self._frozen[number]
            if again:
                self._frozen[number].leave(accepted=True)
        self._parameters.weigh_piece(1.0)

    def doubt(self) -> None:
        """As :meth:`FrozenClosure.doubt`, of each piece."""
        self._doubted = True

    @property
    def compared(self) -> int:
        """Evaluations made anew in doubt."""
        return max((frozen.compared for frozen in self._frozen), default=0)

    def anew(self, frozen: FrozenClosure, observer: LayerObserver | None = None, graph: bool = False) -> Linearisation:
        """The record of a piece once more."""
        self._repeats += 1
        number = next(at for at, other in enumerate(self._frozen) if other is frozen)
        return replace(frozen.linearise(observer, keep_graph=graph), piece=number)

    @property
    def repeated(self) -> int:
        """Evaluations made anew for products or for a preconditioner, in batches, rounded up."""
        return -(-self._repeats // len(self._given))

    def take_penalty(self, penalty: Penalty) -> None:
        """Add another penalty from now on, as it is."""
        self.penalty, self._settled = penalty, True

    # --- what the first evaluation has shown --------------------------------------------------------------------

    @property
    def used(self) -> list[bool]:
        """By parameter, whether the loss depends on it, as the first gradient has shown."""
        return [any(uses) for uses in zip(*(frozen.used for frozen in self._frozen), strict=True)]

    @property
    def returned(self) -> Tensor | None:
        """The weighted sum of what the closures returned first, 0-dim; None where one is no number."""
        found = [frozen.returned for frozen in self._frozen]
        values = [piece.weight * r for piece, r in zip(self._given, found, strict=True) if r is not None]
        return torch.stack(values).sum() if len(values) == len(found) else None

    @property
    def hook_factors(self) -> Tensor | None:
        """(n,), by which hooks on parameters multiply the gradient; None where they change nothing."""
        found = [f for frozen in self._frozen if (f := frozen.hook_factors) is not None]
        return functools.reduce(torch.mul, found) if found else None

    # --- the same state for every evaluation --------------------------------------------------------------------

    def leave(self, accepted: bool) -> None:
        """End the step: random numbers and buffers as after one evaluation, buffers as before it if not accepted."""
        for frozen in self._frozen:
            frozen.leave(accepted=True)
        if not accepted:
            after = RandomState(self._parameters.device)
            self._rewind()
            after.restore()

    def undo(self) -> None:
        """End the step as if no evaluation had been made."""
        self._rewind()

    def _rewind(self) -> None:
        for frozen in reversed(self._frozen):
            frozen.undo()


@dataclass(frozen=True, eq=False)
class JointLinearisation:
    """Loss and gradient of a batch in pieces, and how to come by the records of the pieces.

    Attributes:
        loss, gradient: as of a :class:`Linearisation`.
        pieces: of the batch.
        records: of each piece; None where there was no room.
        convex: whether the loss of every piece is a convex function of outputs.
        penalty: what is added to the loss; it is in ``loss`` and ``gradient``, not in the records.
    """

    loss: Tensor
    gradient: Tensor
    pieces: FrozenPieces
    records: tuple[Linearisation | None, ...]
    convex: bool
    penalty: Penalty | None = None

    @property
    def static(self) -> bool:
        """Whether the evaluations have repeated the structures of earlier ones, as far as records are kept."""
        return all(at.static for at in self.records if at is not None)

    @property
    def repeats(self) -> float:
        """The share of the batch that every product evaluates anew."""
        return self.records.count(None) / len(self.records)

    def matrix(
        self, parameters: ParameterVector, build: Build, definite: bool, graph: bool = False
    ) -> SymmetricOperator:
        """The sum of the pieces' matrices; if they need graphs, each piece is evaluated anew for every product."""
        source: Products = _PieceProducts(self, parameters, build, graph)
        if self.penalty is not None:
            source = ShiftedProducts(source, self.penalty.factors)
        return SymmetricOperator(parameters, source, definite)

    def evaluations(self, observer: Observer) -> Iterator[tuple[float, Linearisation, Observer]]:
        """Each piece's weight and record with its graph, evaluated anew under an observer of its own."""
        for piece, frozen in self.pieces.each():
            own = None if observer is None else observer.fresh()
            yield piece.weight, self.pieces.anew(frozen, own, graph=True), own


class _PieceProducts(Products):
    """Products with the weighted sum of the pieces' matrices."""

    def __init__(self, point: JointLinearisation, parameters: ParameterVector, build: Build, graph: bool) -> None:
        super().__init__(parameters, parameters)
        self._point, self._build, self._graph = point, build, graph
        self._kept = [None if at is None or graph else build(at) for at in point.records]
        self.nbytes = sum(operator.nbytes for operator in self._kept if operator is not None)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        kept = [operator.streams for operator in self._kept if operator is not None]
        return bool(kept) and all(kept)  # what is built anew is as what is kept

    def one(self, direction: Tensor) -> Tensor:
        return self._sum(lambda own: own.matvec(direction))

    def several(self, directions: Tensor) -> Tensor:
        return self._sum(lambda own: own.matmat(directions.t()).t())

    def _sum(self, multiply: Callable[[SymmetricOperator], Tensor]) -> Tensor:
        total: Tensor | None = None
        for (piece, frozen), operator in zip(self._point.pieces.each(), self._kept, strict=True):
            own = self._build(self._point.pieces.anew(frozen, graph=self._graph)) if operator is None else operator
            term = piece.weight * multiply(own)
            total = term if total is None else total.add_(term)
            del own, term  # before the next piece takes its place
        assert total is not None
        return total


FrozenBatch: TypeAlias = "FrozenClosure | FrozenPieces | SharedBatch"
"""A batch, whole, in pieces, or shared by processes."""

Linearised: TypeAlias = "Linearisation | JointLinearisation | SharedLinearisation | DeferredLinearisation"
"""What one evaluation of it shows."""


class _Sum:
    """Sums of what pieces give, each with the piece's weight."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, weight: float, *found: Tensor) -> None:
        weighted = [weight * t for t in found]
        self.terms = [a + b for a, b in zip(self.terms, weighted, strict=True)] if self.terms else weighted
