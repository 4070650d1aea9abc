"""The Hessian of a closure's loss, and its Gauss-Newton part, as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from imstep.complexstep.gauss_newton import gauss_newton
from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import Tape, TapeChangedError, TapeTooLargeError
from imstep.curvature.frozen import Closure, FrozenClosure, Linearisation
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.recomputed import RecomputedProducts
from imstep.linalg import LinearOperator

_ROOM = {False: 2**21, True: 2**28}
"""Bytes, on CPU and GPU, within which k directions together are faster than one by one.

Measured on CPU: beyond the caches a block gains nothing and takes k times the memory. A GPU gains as long as it is not
filled.
"""


class TapeOperator(LinearOperator):
    """A symmetric matrix whose products are replays of a tape from parameters to gradients.

    Args:
        parameters: the vector that the tape's inputs and outputs are parts of.
        tape: its inputs and outputs are the parameters' directions and the gradient's derivative.
        definite: whether the matrix is positive semidefinite by construction.

    Attributes:
        products: how many products were made, a block of k counting k.
    """

    def __init__(
        self, parameters: ParameterVector, tape: Tape | RecomputedProducts, definite: bool = False
    ) -> None:
        super().__init__(parameters.size, parameters.dtype, parameters.device)
        self.parameters, self.definite, self.products = parameters, definite, 0
        self._tape = tape

    @property
    def tape(self) -> Tape:
        """The record that its products replay."""
        assert isinstance(self._tape, Tape)
        return self._tape

    @property
    def nbytes(self) -> int:
        """Bytes that the recorded derivative keeps alive, the parameters included."""
        return self._tape.nbytes

    def check(self) -> None:
        """Raise :class:`TapeChangedError` if the point is not the one that was recorded any more."""
        self._tape.check()

    def matvec(self, vector: Tensor) -> Tensor:
        self.check()
        self.products += 1
        with torch.no_grad():
            return self._apply(vector)

    def matmat(self, block: Tensor) -> Tensor:
        if not self._tape.replays_blocks:
            return super().matmat(block)
        self.check()
        self.products += block.shape[1]
        if block.shape[1] == 0:
            return torch.empty_like(block)
        with torch.no_grad():
            parts = [self._together(rows) for rows in block.t().contiguous().split(self._at_once())]
            return torch.cat(parts).t()

    def _together(self, rows: Tensor) -> Tensor:
        """Products with a few directions (k, n), by one replay."""
        return self._apply(rows[0]).unsqueeze(0) if len(rows) == 1 else torch.vmap(self._apply)(rows)

    def _at_once(self) -> int:
        """How many directions to replay together: as many as the largest intermediate value has room for."""
        return max(1, _ROOM[self.device.type == "cuda"] // max(self._tape.largest, 1))

    def _apply(self, vector: Tensor) -> Tensor:
        return self._replay(vector)[0]

    def _replay(self, vector: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The product, and what else the tape returns."""
        parts = self.parameters.unflatten(vector)
        changes = self._tape.replay(parts)
        # Explicit zeros, so that a product that vanishes has the batch of a block as well.
        pairs = zip(parts, changes[: len(parts)], strict=True)
        product = self.parameters.flatten([torch.zeros_like(p) if c is None else c for p, c in pairs])
        return product, changes[len(parts) :]


class PointOperator(TapeOperator):
    """A curvature matrix together with what its one evaluation of the closure has shown.

    Attributes:
        loss: f(w), a 0-dim tensor.
        gradient: ∇f(w), (n,).
        products: how many products were made, a block of k counting k.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        loss: Tensor,
        gradient: Tensor,
        tape: Tape | RecomputedProducts,
        report: OperatorReport,
        definite: bool,
    ) -> None:
        super().__init__(parameters, tape, definite)
        self.loss, self.gradient = loss, gradient
        self._report = report
        self._values = [p.detach() for p in parameters.tensors], parameters.snapshot()

    def check(self) -> None:
        super().check()
        # Writes through .data leave no trace in a version counter.
        if not all(_same(p, saved) for p, saved in zip(*self._values, strict=True)):
            raise TapeChangedError(
                "a parameter was changed in place after the operator was built; the operator belongs to the old "
                "values. Build it anew at the new point."
            )

    def explain(self) -> OperatorReport:
        """The operators that the closure met, how often, and how each was differentiated."""
        return self._report


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, a NaN being equal to itself; one pass where they are equal, as they are but for mistakes."""
    return torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True)


class Hessian(PointOperator):
    """The Hessian of the loss that ``closure`` returns, at the parameters' values when it was built.

        H v = d/dt ∇f(w + t v) at t = 0  =  Im ∇f(w + ihv) / h

    Building it evaluates the closure once and records the derivative of the gradient; a product replays the record
    for a direction, without running the model again.

    Args:
        closure: returns the loss, a tensor with one entry; it may also call ``zero_grad()`` and ``backward()``.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.
        memory_budget: bytes that the record may keep alive, parameters included; None for no limit. Where it would
            take more, and where the closure overwrites what it would need, every product evaluates the closure anew:
            the closure must then compute the same loss each time.

    Attributes:
        recomputes: why every product evaluates the closure anew, a sentence; None where the record is replayed.
        loss, gradient, products: see :class:`PointOperator`.

    Raises:
        ValueError, TypeError: see :class:`ParameterVector`; the closure returned no usable loss; the budget is
            negative.
        UnsupportedOperatorError: the closure uses an operator without a rule.

    Cost: about 4/3 of a gradient and the memory of its intermediate values to build; two gradients a product.

    Source: Pearlmutter, Neural Computation 6 (1994), 147-160, section 3, in its complex-step form.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> H = Hessian(lambda: (w ** 3).sum(), [w])
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([ 6., 12.])
        >>> H.loss, H.gradient
        (tensor(9.), tensor([ 3., 12.]))
    """

    def __init__(
        self, closure: Closure, params: nn.Module | Iterable[Tensor], memory_budget: int | None = None
    ) -> None:
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget must be None or at least 0 bytes, got {memory_budget}.")
        parameters = ParameterVector(params)
        frozen = FrozenClosure(closure, parameters)
        self._recomputed: RecomputedProducts | None = None
        try:
            point = frozen.linearise(memory_budget=memory_budget)
        except (TapeTooLargeError, TapeChangedError) as error:
            frozen.undo()
            self._recomputed = RecomputedProducts(frozen, parameters, str(error))
            loss, gradient = frozen.watched_gradient()
            super().__init__(parameters, loss, gradient, self._recomputed, OperatorReport(()), definite=False)
        else:
            super().__init__(parameters, point.loss, point.gradient, point.tape, point.report, definite=False)
        finally:
            frozen.leave(accepted=True)

    @property
    def recomputes(self) -> str | None:
        """Why every product evaluates the closure anew; None where the record of one evaluation is replayed."""
        return None if self._recomputed is None else self._recomputed.reason

    def explain(self) -> OperatorReport:
        """The operators that the closure met; where products are recomputed, those of the last one, and the reason."""
        return super().explain() if self._recomputed is None else self._recomputed.report


class GaussNewton(PointOperator):
    """The Gauss-Newton matrix Jᵀ L'' J of a loss L of a model's outputs, at the parameters' values when it was built.

    Args:
        closure: returns ``(outputs, targets)``.
        params: as for :class:`Hessian`.
        loss: maps outputs and targets to a scalar; convex in the outputs and built from squares, PyTorch's mean squared
            error, cross entropy, binary cross entropy, Huber or smooth L1 losses, sums and means of these.

    Attributes: see :class:`PointOperator`.

    Raises:
        ValueError: the loss is of another form; and as for :class:`Hessian`.

    Cost: as :class:`Hessian` to build; 4/3 of a gradient a product.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738, section 3.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> G = GaussNewton(lambda: (model(x), torch.zeros(1, 1)), model)
        >>> G.to_dense()
        tensor([[2., 4.],
                [4., 8.]])
    """

    def __init__(
        self,
        closure: Callable[[], tuple[Tensor, Tensor]],
        params: nn.Module | Iterable[Tensor],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        evaluate = loss or nn.MSELoss()
        parameters = ParameterVector(params)
        point = evaluate_once(lambda: evaluate(*closure()), parameters)
        if point.split is None:
            raise ValueError(
                "the loss is not recognised as a convex function of the outputs, so it has no Gauss-Newton matrix. "
                "Use a loss made of squares, cross entropies or Huber terms by sums and means, or Hessian(...)."
            )
        tape = gauss_newton(point.tape, point.split)
        super().__init__(parameters, point.loss, point.gradient, tape, point.report, definite=True)


def evaluate_once(closure: Closure, parameters: ParameterVector) -> Linearisation:
    """The linearisation of a closure at its parameters, leaving random state and buffers as one evaluation does."""
    frozen = FrozenClosure(closure, parameters)
    try:
        return frozen.linearise()
    finally:
        frozen.leave(accepted=True)


def hessian_of(point: Linearisation, parameters: ParameterVector) -> TapeOperator:
    """The Hessian at a point that was evaluated already."""
    return TapeOperator(parameters, point.tape)


def gauss_newton_of(point: Linearisation, parameters: ParameterVector) -> TapeOperator | None:
    """The Gauss-Newton matrix at a point that was evaluated already; None where the loss has no convex end."""
    if point.split is None:
        return None
    return TapeOperator(parameters, gauss_newton(point.tape, point.split), definite=True)
