"""A batch in pieces, each small enough for memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imstep.curvature.batches import ROOM_FOR_RECORDS
from imstep.curvature.evaluation import checked_budget
from imstep.curvature.means import Means
from imstep.curvature.pieces import Piece
from imstep.curvature.reduction import MeanOverSamples, Reduction


class MicroBatches:
    """A closure for a batch that does not fit into memory: the losses of its pieces, of which one at a time is kept.

        f = Σ_k w_k f_k,   w_k = N_k / N for a mean over samples

    ``optimizer.step(MicroBatches(loss, batches))`` is the step on all batches together. A list of closures in its place
    is added up as it is, like gradients that accumulate. Batch normalisation in training mode sees a piece at a time,
    and its running statistics are updated once for each.

    Args:
        closure: called with a piece, returns its loss; or calls ``backward()`` on it, where the optimizer does not take
            the pieces at once, as ``LeastSquares`` does.
        batches: the pieces. They are gone through once, and kept for the step: a generator will do, such as
            ``itertools.islice`` of a loader's iterator.
        reduction: how losses of pieces make up the whole: ``MeanOverSamples()``, the default, or ``SumOverBatches()``.
        memory_budget: bytes that the records of all pieces may take together; None for no limit. Pieces beyond it are
            recorded anew for every product. 0 for the least memory.

    Raises:
        ValueError: a weight is not positive; the budget is negative; no weights are told, and those that are guessed do
            not make the mean over all. In a step: that, and there are no pieces.

    Cost: that of the whole batch; for every product with a piece without a record, a linearisation of the piece, and
        one where the preconditioner is refreshed.

    Source: our choice; the budget is that of ``Hessian.over``.

    Example:
        >>> from imstep import NewtonKrylov
        >>> w, data = torch.nn.Parameter(torch.zeros(3)), torch.arange(12.0).reshape(4, 3)
        >>> optimizer = NewtonKrylov([w])
        >>> loss = optimizer.step(MicroBatches(lambda x: (w - x).square().mean(), data.split(1)))
        >>> [round(entry, 2) for entry in w.tolist()]
        [4.5, 5.5, 6.5]
    """

    def __init__(
        self,
        closure: Callable[[Any], Any],
        batches: Iterable[Any],
        *,
        reduction: Reduction | None = None,
        memory_budget: int | None = ROOM_FOR_RECORDS,
    ) -> None:
        reduction, kept = reduction or MeanOverSamples(), list(batches)
        means = Means(reduction)
        weights = [means.weigh(batch) for batch in kept]
        scale = reduction.scale(sum(weights)) if kept else 1.0
        weighed = enumerate(zip(weights, kept, strict=True))
        pieces = [Piece(scale * w, partial(closure, batch), partial(means.look, at)) for at, (w, batch) in weighed]
        self.reduction, self.count = reduction, sum(weights)
        self._fill(pieces, memory_budget)

    reduction: Reduction | None = None
    """How the pieces make up the whole; None where they are added up as they are."""

    count = 0.0
    """The weights of the pieces together, before scaling."""

    def checked(self) -> MicroBatches:
        """Itself; raises if there are no pieces."""
        if not self.pieces:
            raise ValueError("a step needs at least one piece of a batch, got none. Is the loader's iterator used up?")
        return self

    def _fill(self, pieces: list[Piece], memory_budget: int | None) -> None:
        if not all(piece.weight > 0 for piece in pieces):
            raise ValueError(
                f"weights of pieces are positive, got {[piece.weight for piece in pieces]}. Leave empty pieces out."
            )
        self.pieces, self.memory_budget = pieces, checked_budget(memory_budget)

    @classmethod
    def of(cls, closure: Any) -> MicroBatches | None:
        """The pieces that a step was given: those of a ``MicroBatches``, or of a list of closures; None for neither.

        Raises:
            TypeError: the list holds something else than functions.
        """
        if isinstance(closure, MicroBatches):
            return closure
        if not isinstance(closure, Sequence) or callable(closure):
            return None
        wrong = [c for c in closure if not callable(c)]
        if wrong:
            raise TypeError(
                f"a step on several pieces takes a list of closures; it holds a {type(wrong[0]).__name__}. "
                "For a function of batches pass MicroBatches(function, batches)."
            )
        self = cls.__new__(cls)
        self._fill([Piece(1.0, c) for c in closure], ROOM_FOR_RECORDS)
        return self

    def __call__(self) -> Tensor:
        """The loss of the whole, evaluated at once: what another optimizer takes, without saving memory.

        Raises:
            ValueError: a piece calls ``backward()``, which knows no weights.
        """
        self.checked()
        with _NoBackward():
            losses = [_seen(piece) for piece in self.pieces]
        return torch.stack([piece.weight * loss for piece, loss in zip(self.pieces, losses, strict=True)]).sum()


def _seen(piece: Piece) -> Tensor:
    loss: Tensor = piece.closure()
    if piece.look is not None and isinstance(loss, Tensor):
        piece.look([loss])
    return loss


class _NoBackward(TorchFunctionMode):
    """A context in which the loss is not to be differentiated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.backward, torch.autograd.backward):
            raise ValueError(
                "a piece of a batch calls backward() itself, where its loss is to be weighted and added to others. "
                "Return the loss, and leave backward() out."
            )
        return func(*args, **(kwargs or {}))
