"""The Hessian of a closure's loss as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from imstep.complexstep.gauss_newton import gauss_newton
from imstep.curvature.batches import ROOM_FOR_RECORDS, BatchOperator, ProgressCallback, Series, over
from imstep.curvature.evaluation import BatchCurvature, Point
from imstep.curvature.frozen import Closure
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import PointOperator, SymmetricOperator, TapeOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.products import ReplayedProducts
from imstep.curvature.reduction import Reduction
from imstep.curvature.sharded import parameters_of
from imstep.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
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

    Attributes: see :class:`PointOperator`.

    Raises:
        ValueError, TypeError: see :class:`ParameterVector`; the closure returned no usable loss; the budget is
            negative.
        UnsupportedOperatorError: the closure uses an operator without a rule.

    Cost: about 4/3 of a gradient and the memory of its intermediate values to build; two gradients a product.

    Source: Pearlmutter, Neural Computation 6 (1994), 147-160, section 3, in its complex-step form.

    Example:
        >>> import torch
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
        parameters = ParameterVector(params)
        super().__init__(parameters, BatchHessian(closure, parameters).once(memory_budget))

    @classmethod
    def over(
        cls,
        batches: Iterable[Any],
        closure: Callable[[Any], Tensor],
        params: nn.Module | Iterable[Tensor],
        *,
        reduction: Reduction | None = None,
        memory_budget: int | None = ROOM_FOR_RECORDS,
        progress: ProgressCallback | None = None,
        process_group: ProcessGroup | None = None,
    ) -> BatchOperator:
        """The Hessian of the loss over all ``batches``, which need not fit into memory together.

            H = Σ_b w_b H_b,   w_b = N_b / N for a mean over samples

        Building it goes through the batches once. Records are kept as long as the budget lasts; for batches beyond it
        every product goes through the iterable again. Each batch is loaded and evaluated on the random numbers of its
        first time, so that a loader that shuffles by the global generator gives the same batches again.

        Args:
            batches: an iterable that starts anew each time it is gone through, such as a list or a DataLoader.
            closure: called with a batch, returns its loss.
            params: as for :class:`Hessian`.
            reduction: how losses of batches make up the whole: ``MeanOverSamples()``, the default, or
                ``SumOverBatches()``. A mean that is not over samples, such as one with class weights or ignored
                labels, needs to be told what it is over: ``MeanOverSamples(count=...)``.
            memory_budget: bytes that the records of all batches may take together; None for no limit.
            progress: called after each batch with the number of batches done and of all (None if not known), while the
                operator is built and while a product goes through the batches.
            process_group: of ``torch.distributed``, each of whose processes has ``batches`` of its own, or none; the
                whole is over those of all. All processes then make the same products with the same vectors. Parameters
                may be sharded over them by ``fully_shard``: products of a whole vector (n,) are whole then, and those
                of a sharded one, such as ``gradient``, are sharded. None for one process.

        Returns:
            An operator as :class:`Hessian`, with ``loss`` and ``gradient`` of the whole, ``batches`` and ``recorded``.
            Random numbers are left as one pass over the batches leaves them, buffers as they were: every batch is
            evaluated on the same ones.

        Raises:
            TypeError: ``batches`` is an iterator, which would be used up.
            ValueError: there are no batches; no ``reduction`` is told, and losses are means over what is not in
                proportion to the lengths of batches, or sums; and as for :class:`Hessian`.
            RuntimeError: (in a product) the iterable gave other batches than at first.
            OtherProcessError, ProcessesLostError: as for :class:`~imstep.NewtonKrylov` with a ``process_group``.

        Cost: that of :class:`Hessian` for each batch; about three gradients a product for a batch without a record;
            with a ``process_group`` one all-reduce of n numbers a product, or of k n for a block of k.

        Example:
            >>> import torch
            >>> w = nn.Parameter(torch.tensor([1.0]))
            >>> H = Hessian.over([torch.ones(2), 2 * torch.ones(1)], lambda x: (x * w**2).mean(), [w])
            >>> H.loss, H.to_dense()
            (tensor(1.3333), tensor([[2.6667]]))
        """
        parameters = parameters_of(params, process_group)
        series = Series(batches, closure, parameters, lambda f, vector, number: BatchHessian(f, vector))
        return over(series, reduction, memory_budget, progress)


class BatchHessian(BatchCurvature):
    """The Hessian of a closure's loss on its batch."""

    def record(self, memory_budget: int | None) -> Point:
        at = self.frozen.linearise(memory_budget=memory_budget, cotangents=True)
        source = ReplayedProducts(at.tape, self.parameters, self.parameters)
        return Point(at.loss, at.gradient, source, False, at.report)

    def without_record(self, reason: str) -> Point:
        return self.recomputed(*self.frozen.watched_gradient(), definite=False, reason=reason)

    def loss_and_product(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        return self.frozen.loss_and_product(direction)


@overload
def hessian_of(point: Linearisation, parameters: ParameterVector) -> TapeOperator: ...


@overload
def hessian_of(point: Linearised, parameters: ParameterVector) -> SymmetricOperator: ...


def hessian_of(point: Linearised, parameters: ParameterVector) -> SymmetricOperator:
    """The Hessian at a point that was evaluated already."""
    evaluated = parameters.evaluated
    return point.matrix(parameters, lambda at: TapeOperator(evaluated, at.tape, penalty=at.penalty), definite=False)


@overload
def gauss_newton_of(point: Linearisation, parameters: ParameterVector) -> TapeOperator | None: ...


@overload
def gauss_newton_of(
    point: Linearised, parameters: ParameterVector
) -> SymmetricOperator | None: ...


def gauss_newton_of(
    point: Linearised, parameters: ParameterVector
) -> SymmetricOperator | None:
    """The Gauss-Newton matrix at a point that was evaluated already; None where the loss has no convex end."""

    def build(at: Linearisation) -> TapeOperator:
        assert at.split is not None
        tape = gauss_newton(at.tape, at.split.nodes)
        return TapeOperator(parameters.evaluated, tape, definite=True, penalty=at.penalty)

    return point.matrix(parameters, build, definite=True) if point.convex else None
