"""Curvature of a data set: the matrices of its batches summed, though they need not fit into memory together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imstep.complexstep.report import OperatorReport
from imstep.curvature.evaluation import BatchCurvature, Point, checked_budget
from imstep.curvature.frozen import Closure
from imstep.curvature.means import Means
from imstep.curvature.operators import PointOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes, check_parameters, digest
from imstep.curvature.products import Products, SummedProducts
from imstep.curvature.reduction import MeanOverSamples, Reduction, shares
from imstep.curvature.sharded import shown_for
from imstep.curvature.shared import SharedProducts
from imstep.curvature.state import RandomState
from imstep.curvature.unmoved import Unmoved

ROOM_FOR_RECORDS = 2**30
"""Bytes that the records of all batches may take by default. Our choice: a share of a small machine's memory."""

ProgressCallback = Callable[[int, "int | None"], None]
"""Called after each batch: how many are done, and of how many (None if that is not known yet)."""

_END = object()


class BatchOperator(PointOperator):
    """A curvature matrix of the loss over all batches; made by ``over`` of the matrix's class.

    Attributes: see :class:`PointOperator`.
        batches: how many there are.
        recorded: of how many a record is replayed; products go through the iterable again for the others.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        point: Point,
        batches: int,
        recorded: int,
        guard: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(parameters, point, guard)
        self.batches, self.recorded = batches, recorded


@dataclass(frozen=True, eq=False)
class Series:
    """Batches, and the matrix that each has.

    Args:
        batches: can be gone through several times, with the same batches in the same order where random numbers are
            the same.
        closure: called with a batch, returns what the matrix is made of.
        parameters: the vector that is differentiated.
        kind: the matrix of a closure; also given the number of the batch.

    Raises:
        TypeError: ``batches`` can be gone through only once.
    """

    batches: Iterable[Any]
    closure: Callable[[Any], Any]
    parameters: ParameterVector
    kind: Callable[[Closure, ParameterVector, int], BatchCurvature]

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise TypeError(
                f"batches is an iterator ({type(self.batches).__name__}), which can be gone through only once; "
                "products may need the batches again. Pass a list, a DataLoader or another iterable that starts anew."
            )

    def curvature(self, batch: Any, number: int) -> BatchCurvature:
        """The matrix of one batch."""
        processes = self.parameters.processes
        if processes is not None:  # as random targets go by them
            number = processes.own_number(number)
        return self.kind(partial(self.closure, batch), self.parameters, number)

    def random_state(self) -> RandomState:
        """Where all random numbers are now."""
        return RandomState(self.parameters.device)


@dataclass(frozen=True, eq=False)
class Visit:
    """A batch without a record, and how to meet it again.

    Attributes:
        number: of the batch.
        loading: random numbers before it was loaded.
        weight: how much it counts.
        loss: its loss, 0-dim.
    """

    number: int
    loading: RandomState
    weight: float
    loss: Tensor


def over(
    series: Series, reduction: Reduction | None, memory_budget: int | None, progress: ProgressCallback | None
) -> BatchOperator:
    """The operator of a series, by going through it once; see :meth:`Hessian.over`."""
    reduction, processes = reduction or MeanOverSamples(), series.parameters.processes
    if processes is not None:
        return _over_processes(processes, series, reduction, memory_budget, progress)
    return _operator(series, reduction, _gone_through(series, reduction, memory_budget, progress))


class _Found(NamedTuple):
    """What a process tells the others of its batches."""

    parameters: int  # a digest
    weight: float = 0.0
    definite: bool = True
    batches: int = 0
    recorded: int = 0
    recomputes: str | None = None


def _over_processes(
    processes: Processes,
    series: Series,
    reduction: Reduction,
    memory_budget: int | None,
    progress: ProgressCallback | None,
) -> BatchOperator:
    """The operator of the series of all processes, some of which may have no batches."""
    own: list[BatchOperator] = []
    parameters, series = series.parameters, replace(series, parameters=series.parameters.evaluated)

    def gone_through() -> _Found:
        tally, sign = _gone_through(series, reduction, memory_budget, progress), digest(parameters.replicated)
        if not tally.weights:
            return _Found(sign)
        A = _operator(series, reduction, tally, Unmoved(parameters))
        own.append(A)
        return _Found(sign, sum(tally.weights), A.definite, A.batches, A.recorded, A.recomputes)

    def at_point() -> Tensor | None:
        return share * torch.cat([own[0].loss.reshape(1).to(own[0].gradient), own[0].gradient]) if own else None

    with parameters.shown():
        every = processes.gather(gone_through)
        check_parameters([found.parameters for found in every])
        batches, recorded = sum(found.batches for found in every), sum(found.recorded for found in every)
        _check_any(batches)
        share = shares(reduction, [found.weight for found in every])[processes.rank]
        (loss,), (gradient,) = parameters.summed(at_point, 1, 1)
        if recorded:
            parameters.keep()
    reason = next((found.recomputes for found in every if found.recomputes is not None), None)
    source: Products = SharedProducts(parameters, (lambda: own[0]) if own else None, share)
    source = source if reason is None else shown_for(parameters, source)
    report = own[0].explain if own else lambda: OperatorReport((), note="this process has no batches")
    definite = all(found.definite for found in every)
    whole = Point(loss, gradient, source, definite, report, reason)
    return BatchOperator(parameters, whole, batches, recorded, guard=lambda: None)


def _operator(
    series: Series, reduction: Reduction, tally: _Tally, guard: Callable[[], None] | None = None
) -> BatchOperator:
    """The operator of the batches of this process."""
    _check_any(len(tally.weights) + tally.left_out)
    scale = reduction.scale(sum(tally.weights))
    parts = [(scale * weight, source) for weight, source in zip(tally.weights, tally.sources, strict=False)]
    if tally.visits:
        parts.append((scale, RevisitingProducts(series, tally.start, tally.visits, tally.progress)))
    point = tally.point(scale, parts)
    return BatchOperator(series.parameters, point, len(tally.weights), len(tally.sources), guard)


def _check_any(batches: int) -> None:
    if not batches:
        raise ValueError("there are no batches to sum over: the iterable is empty.")


def _gone_through(
    series: Series, reduction: Reduction, memory_budget: int | None, progress: ProgressCallback | None
) -> _Tally:
    """What going through the batches shows."""
    room, progress = checked_budget(memory_budget), progress or _quiet
    expected = len(series.batches) if isinstance(series.batches, Sized) else None
    tally, iterator = _Tally(room, series.random_state(), progress), iter(series.batches)
    means, weighed = Means(reduction), itertools.count()
    for number in itertools.count():
        loading = series.random_state()
        batch = next(iterator, _END)
        if batch is _END:
            break
        weight = means.weigh(batch)
        if weight == 0:  # its loss may be a mean over nothing
            tally.left_out += 1
        else:
            curvature = series.curvature(batch, number)
            curvature.frozen.user.look = partial(means.look, next(weighed))
            loss = tally.meet(curvature, weight)
            if tally.reason is not None:
                tally.visits.append(Visit(number, loading, weight, loss))
        progress(number + 1, expected)
    return tally


class _Tally:
    """What the batches so far have shown."""

    def __init__(self, room: int | None, start: RandomState, progress: ProgressCallback) -> None:
        self.start, self.progress = start, progress
        self.weights: list[float] = []
        self.sources: list[Products] = []
        self.visits: list[Visit] = []
        self.left_out = 0  # batches that count nothing
        self.reason: str | None = None
        self._room, self._definite = room, True
        self._loss = self._gradient = torch.zeros(())
        self._report = OperatorReport(())

    def meet(self, curvature: BatchCurvature, weight: float) -> Tensor:
        """Evaluate a batch, keeping its record if all before it were kept and there is room; returns its loss."""
        try:
            # After the first without a record none is tried: one that does not fit costs an evaluation.
            known = self.reason
            point = curvature.evaluate(self._room) if known is None else curvature.without_record(known)
        finally:
            curvature.frozen.leave(accepted=False)
        self.reason = point.recomputes
        if self.reason is None:
            self.sources.append(point.source)
            self._room = None if self._room is None else self._room - point.source.nbytes
        if not self.weights:
            self._report = point.report()
        self.weights.append(weight)
        self._loss = self._loss + weight * point.loss
        self._gradient = self._gradient + weight * point.gradient
        self._definite = self._definite and point.definite and weight >= 0
        return point.loss

    def point(self, scale: float, parts: list[tuple[float, Products]]) -> Point:
        """The whole."""
        count, reason = len(self.weights), self.reason
        if reason is not None:
            reason = f"{len(self.visits)} of {count} batches are evaluated anew for every product: {reason}"
        report = replace(self._report, note=f"the first of {count} batches" + (f"; {reason}" if reason else ""))
        source = SummedProducts(parts)
        return Point(scale * self._loss, scale * self._gradient, source, self._definite, lambda: report, reason)


class RevisitingProducts(Products):
    """Products with the weighted sum over batches without a record: each goes through the batches again.

    Args:
        series: the batches.
        start: random numbers before they were gone through first.
        visits: the batches without a record, in order.
        progress: called after each batch.
    """

    def __init__(self, series: Series, start: RandomState, visits: list[Visit], progress: ProgressCallback) -> None:
        super().__init__(series.parameters, series.parameters)
        self._series, self._start, self._progress = series, start, progress
        self._visits = {visit.number: visit for visit in visits}
        self._count = visits[-1].number + 1

    def one(self, direction: Tensor) -> Tensor:
        return self.several(direction.unsqueeze(0)).squeeze(0)

    def several(self, directions: Tensor) -> Tensor:
        now = self._series.random_state()
        try:
            return self._pass(directions)
        finally:
            now.restore()

    def _pass(self, directions: Tensor) -> Tensor:
        total = torch.zeros_like(directions)
        self._start.restore()
        iterator = iter(self._series.batches)
        for number in range(self._count):
            visit = self._visits.get(number)
            if visit is not None:
                visit.loading.restore()
            batch = next(iterator, _END)
            if batch is _END:
                raise RuntimeError(f"the iterable ended after {number} batches; there were at least {self._count}.")
            if visit is not None:
                total += visit.weight * self._products(batch, visit, directions)
            self._progress(number + 1, self._count)
        return total

    def _products(self, batch: Any, visit: Visit, directions: Tensor) -> Tensor:
        curvature = self._series.curvature(batch, visit.number)
        try:
            pairs = [curvature.loss_and_product(direction) for direction in directions]
        finally:
            curvature.frozen.undo()
        if not _same_loss(pairs[0][0], visit.loss):
            raise RuntimeError(
                f"batch {visit.number} has the loss {float(pairs[0][0]):g}; when the operator was built it was "
                f"{float(visit.loss):g}. The iterable must give the same batches in the same order each time: do not "
                "shuffle by a generator of its own, or raise memory_budget so that every record is kept."
            )
        return torch.stack([product for _, product in pairs])


def _same_loss(a: Tensor, b: Tensor) -> bool:
    """Up to what the order of additions may change."""
    return torch.allclose(a, b, rtol=torch.finfo(a.dtype).eps ** 0.5, atol=torch.finfo(a.dtype).tiny, equal_nan=True)


def _quiet(done: int, expected: int | None) -> None:
    return None
