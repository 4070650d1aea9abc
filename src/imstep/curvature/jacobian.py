"""The Jacobian of a model's outputs as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imstep.complexstep.islands import plain
from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import Tape, TapeChangedError, TapeTooLargeError
from imstep.curvature.batches import ROOM_FOR_RECORDS, ProgressCallback
from imstep.curvature.closure import usable
from imstep.curvature.evaluation import checked_budget
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.operators import ProductsOperator
from imstep.curvature.parameters import ParameterVector, TensorVector
from imstep.curvature.processes import Processes, check_parameters, digest
from imstep.curvature.products import (
    JoinedProducts,
    Products,
    RecomputedProducts,
    ReplayedProducts,
    StackedProducts,
)
from imstep.curvature.repeating import require_unchanged
from imstep.curvature.rows_of_processes import GatheredProducts, ScatteredProducts
from imstep.curvature.sharded import parameters_of, shown_for
from imstep.curvature.unmoved import Unmoved
from imstep.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
class Jacobian(ProductsOperator):
    """The Jacobian of the outputs that ``closure`` returns, at the parameters' values when it was built.

        J v = d/dt z(w + t v) at t = 0  =  Im z(w + ihv) / h,      Jᵀu by the backward pass of z

    Building it evaluates the closure once and records the derivative of the outputs and their backward pass; products
    with J and with ``J.T`` replay the records.

    Args:
        closure: returns the outputs z, a tensor of any shape with m entries; rows are in row-major order of it.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.
        memory_budget: as for :class:`Hessian`, for both records together.

    Attributes:
        shape: (m, n).
        outputs: z(w), of the shape that the closure gave it.
        recomputes: why products evaluate the closure anew, a sentence; None where records are replayed.
        products: how many products were made with J and Jᵀ, a block of k counting k.

    Raises:
        ValueError, TypeError: see :class:`ParameterVector`; the closure returned no real tensor with a graph.
        UnsupportedOperatorError: the closure uses an operator without a rule.

    Cost: about a gradient to build; a product with J two thirds of a gradient's matrix products, with Jᵀ as much.

    Source: forward mode by the complex step, Martins, Sturdza and Alonso, ACM Transactions on Mathematical Software 29
        (2003), 245-262; the backward pass is the model's own.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> J = Jacobian(lambda: torch.stack([w.sum(), w.prod(), w[0] ** 2]), [w])
        >>> J @ torch.tensor([1.0, 1.0])
        tensor([2., 3., 2.])
        >>> J.T @ torch.tensor([0.0, 1.0, 0.0])
        tensor([2., 1.])
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        params: nn.Module | Iterable[Tensor],
        memory_budget: int | None = None,
    ) -> None:
        parameters = ParameterVector(params)
        evaluation = _Evaluation(FrozenClosure(closure, parameters), parameters)
        self._take(parameters, evaluation.once(checked_budget(memory_budget)))

    def _take(self, parameters: ParameterVector, point: _Outputs) -> None:
        guard = Unmoved(parameters) if point.guarded else lambda: None
        super().__init__(point.forward, point.transposed, guard)
        self.parameters, self.outputs, self.recomputes = parameters, point.outputs, point.recomputes
        self._report = point.report

    @classmethod
    def over(
        cls,
        batches: Iterable[Any],
        closure: Callable[[Any], Tensor],
        params: nn.Module | Iterable[Tensor],
        *,
        memory_budget: int | None = ROOM_FOR_RECORDS,
        progress: ProgressCallback | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Jacobian:
        """The Jacobian of the outputs of all ``batches``, one below the other.

        Args:
            batches: an iterable, such as a DataLoader; gone through once.
            closure: called with a batch, returns its outputs.
            params: as for :class:`Jacobian`.
            memory_budget: bytes that the records of all batches may take together; None for no limit. Batches beyond
                it are kept themselves, and evaluated anew for every product.
            progress: called after each batch with the number of batches done and of all (None if not known).
            process_group: as for :meth:`Hessian.over`; outputs and rows of process 0 come first, then those of 1, ...
                Of parameters that are sharded products are whole.

        Returns:
            An operator as :class:`Jacobian`, with the outputs joined along their first dimension. Buffers are left as
            they were: every batch is evaluated on the same ones.

        Raises:
            ValueError: there are no batches; and as for :class:`Jacobian`.

        Example:
            >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> J = Jacobian.over([torch.eye(2), torch.ones(1, 2)], lambda x: x @ w, [w])
            >>> J.outputs, J.to_dense()
            (tensor([1., 2., 3.]), tensor([[1., 0.],
                    [0., 1.],
                    [1., 1.]]))
        """
        parameters = parameters_of(params, process_group)
        taken = lambda: _taken(batches, closure, parameters.evaluated, memory_budget, progress)
        if parameters.processes is not None:
            point = _joined_over(parameters.processes, parameters, taken)
        else:
            point = _joined(taken())
        self = cls.__new__(cls)
        self._take(parameters, point)
        return self

    def block(self, params: nn.Module | Iterable[Tensor]) -> ProductsOperator:
        """The columns of some of the parameters, as an operator on their part of the vector.

        Args:
            params: a module or an iterable of parameters, all among those of this operator; in the order given.

        Raises:
            ValueError: a parameter is not among those of this operator.
        """
        columns, rows = self.parameters.positions(params), range(len(self._forward.rows.forms))
        return ProductsOperator(self._forward.block(rows, columns), self._transposed.block(columns, rows), self.check)

    def explain(self) -> OperatorReport:
        """The operators that the closure met going forward, how often, and how each was differentiated."""
        return self._report


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What one evaluation shows: see :class:`Jacobian`."""

    outputs: Tensor
    forward: Products
    transposed: Products
    report: OperatorReport
    recomputes: str | None = None
    guarded: bool = True


def _taken(
    batches: Iterable[Any],
    closure: Callable[[Any], Tensor],
    parameters: ParameterVector,
    memory_budget: int | None,
    progress: ProgressCallback | None,
) -> list[_Outputs]:
    """The outputs of each batch."""
    room = checked_budget(memory_budget)
    expected = len(batches) if isinstance(batches, Sized) else None
    points: list[_Outputs] = []
    for batch in batches:
        point = _Evaluation(FrozenClosure(partial(closure, batch), parameters), parameters).once(room, False)
        points.append(point)
        if room is not None and point.recomputes is None:
            room -= point.forward.nbytes + point.transposed.nbytes
        if progress is not None:
            progress(len(points), expected)
    return points


def _joined(points: list[_Outputs]) -> _Outputs:
    """The outputs of several batches, one below the other."""
    if not points:
        raise ValueError("there are no batches to take outputs of: the iterable is empty.")
    outputs = [point.outputs for point in points]
    alike = all(z.ndim > 0 and z.shape[1:] == outputs[0].shape[1:] for z in outputs)
    recomputed = [point.recomputes for point in points if point.recomputes is not None]
    reason = f"{len(recomputed)} of {len(points)} batches are evaluated anew for every product: " if recomputed else ""
    return _Outputs(
        torch.cat(outputs if alike else [z.reshape(-1) for z in outputs]),
        StackedProducts([point.forward for point in points]),
        JoinedProducts([point.transposed for point in points]),
        points[0].report,
        reason + recomputed[0] if recomputed else None,
    )


def _joined_over(
    processes: Processes, parameters: ParameterVector, take: Callable[[], list[_Outputs]]
) -> _Outputs:
    """The outputs of the batches of all processes, one below the other in order of their numbers."""
    own: list[_Outputs] = []

    def forms() -> tuple[int, list[tuple[torch.Size, torch.dtype]], str | None]:
        points, sign = take(), digest(parameters.replicated)
        if not points:
            return sign, [], None
        own.append(_joined(points))
        return sign, own[0].forward.rows.forms, own[0].recomputes

    with parameters.shown():
        every = processes.gather(forms)
        parameters.keep()
    check_parameters([sign for sign, _, _ in every])
    whole = [form for _, some, _ in every for form in some]
    if not whole:
        raise ValueError("there are no batches to take outputs of: the iterable is empty in every process.")
    rows = TensorVector(whole, parameters.dtype, parameters.device)
    before = sum(len(some) for _, some, _ in every[: processes.rank])
    start = sum(rows.sizes[:before])
    place = slice(start, start + (own[0].forward.rows.size if own else 0))
    guard = Unmoved(parameters)
    gathered = GatheredProducts(processes, own[0].forward if own else None, rows, parameters, place, guard)
    scattered = ScatteredProducts(processes, own[0].transposed if own else None, parameters, rows, place, guard)
    outputs = gathered.placed(lambda: own[0].outputs.reshape(1, -1) if own else None, 1, None)[0]
    alike = all(len(shape) > 0 and shape[1:] == whole[0][0][1:] for shape, _ in whole)
    shaped = outputs.reshape(-1, *whole[0][0][1:]) if alike else outputs
    reason = next((reason for _, _, reason in every if reason is not None), None)
    forward, transposed = (
        products if reason is None else shown_for(parameters, products) for products in (gathered, scattered)
    )
    report = own[0].report if own else OperatorReport((), note="this process has no batches")
    return _Outputs(shaped.to(whole[0][1]), forward, transposed, report, reason, guarded=False)


class _Evaluation:
    """A model's outputs on one batch, and their derivative."""

    def __init__(self, frozen: FrozenClosure, parameters: ParameterVector) -> None:
        self._frozen, self._parameters = frozen, parameters

    def once(self, memory_budget: int | None, accepted: bool = True) -> _Outputs:
        """The first evaluation, leaving random numbers as one evaluation does, and buffers too if ``accepted``."""
        try:
            return self._record(memory_budget)
        except (TapeTooLargeError, TapeChangedError) as error:
            self._frozen.undo(error)
            return self._without_record(str(error))
        finally:
            self._frozen.leave(accepted)

    def _record(self, memory_budget: int | None) -> _Outputs:
        vector, tape = self._parameters, Tape(memory_budget)
        arithmetic = self._frozen.arithmetic(tape=tape)
        with self._frozen.perturbed(arithmetic):
            outputs = self._evaluate()
            self._frozen.check_sight([outputs], arithmetic)
            arithmetic.finish([outputs])
        rest = None if memory_budget is None else max(memory_budget - tape.nbytes, 0)
        backward = Tape(rest)
        usable(arithmetic.transpose(outputs, vector.tensors, backward), "the output")
        rows = self._rows(outputs)
        forward, transposed = ReplayedProducts(tape, rows, vector), ReplayedProducts(backward, vector, rows)
        return _Outputs(outputs.detach(), forward, transposed, arithmetic.report())

    def _without_record(self, reason: str) -> _Outputs:
        vector, arithmetic = self._parameters, self._frozen.arithmetic()
        with self._frozen.perturbed(arithmetic, []):
            outputs = self._evaluate()
            self._frozen.check_sight([outputs], arithmetic)
        rows = self._rows(outputs)
        usable(arithmetic.pullback([outputs], vector.tensors, [torch.zeros_like(outputs)]), "the output")
        first = outputs.detach()
        forward = RecomputedProducts(lambda v: rows.flatten([self._push(first, vector.unflatten(v))]), rows, vector)
        transposed = RecomputedProducts(lambda u: vector.flatten(self._pull(first, *rows.unflatten(u))), vector, rows)
        return _Outputs(first, forward, transposed, arithmetic.report(), reason)

    def _push(self, first: Tensor, directions: list[Tensor]) -> Tensor | None:
        arithmetic = self._frozen.arithmetic()
        with self._frozen.aside():
            with self._frozen.perturbed(arithmetic, directions):
                now = arithmetic.value(self._evaluate())
            require_unchanged(first, now.re)
            return now.im

    def _pull(self, first: Tensor, weight: Tensor) -> list[Tensor | None]:
        arithmetic = self._frozen.arithmetic()
        with self._frozen.aside():
            with self._frozen.perturbed(arithmetic, []):
                outputs = self._evaluate()
            require_unchanged(first, outputs)
            return arithmetic.pullback([outputs], self._parameters.tensors, [weight])

    def _rows(self, outputs: Tensor) -> TensorVector:
        return TensorVector([(outputs.shape, outputs.dtype)], self._parameters.dtype, self._parameters.device)

    def _evaluate(self) -> Tensor:
        outputs = self._frozen.evaluate()
        outputs = plain(outputs) if isinstance(outputs, Tensor) else outputs
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            got = f"a tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(
                f"closure returned {got}; a Jacobian needs the outputs as one real floating-point tensor. "
                "Join several with torch.cat, complex ones with torch.view_as_real."
            )
        if not outputs.requires_grad:
            raise ValueError(
                "closure returned outputs without a graph; a Jacobian needs it. "
                "Return the outputs themselves, not detached, and do not compute them under no_grad."
            )
        return outputs
