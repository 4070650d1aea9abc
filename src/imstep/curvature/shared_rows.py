"""A matrix whose rows are spread over processes, for solvers that know nothing of these.

What solvers make of it, numbers for each row or for each column, is the same in all processes, bit for bit. What costs
most is shared: products, columns of J Jᵀ, and the factorisation of rows that are more than the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.processes import Processes
from imstep.linalg import BlockQR, DenseRows, GramMatrix, RowMatrix
from imstep.linalg.gram import BLOCK

_CHUNK = 128
"""Rows of a Gram matrix at a time."""


class Stack:
    """Rows of which each process has some, one below the other in order of their numbers.

    Args:
        processes: that have them.
        counts: how many each has.

    Attributes:
        place: of this process's rows.
        size: N, how many there are.
    """

    def __init__(self, processes: Processes, counts: Sequence[int]) -> None:
        self.processes, self.counts, self.size = processes, list(counts), sum(counts)
        start = sum(counts[: processes.rank])
        self.place = slice(start, start + counts[processes.rank])

    def join(self, find: Callable[[], Tensor], like: Any, *columns: int, at: Tensor | None = None) -> Tensor:
        """What each process finds for its rows, (N_r, ...), as (N, ...); one sum.

        Args:
            like: gives dtype and device.
            columns: the shape for a row.
            at: what all must have the same of.
        """
        shape = (self.size, *columns)

        def part() -> Tensor:
            whole = torch.zeros(shape, dtype=like.dtype, device=like.device)
            whole[self.place] = find()
            return whole.reshape(-1)

        return self.processes.sum(part, math.prod(shape), like, at).view(shape)


class SharedRows(RowMatrix):
    """A matrix J, (N, n), of which each process has some rows.

    Args:
        stack: how many rows each process has.
        own: those of this process, (N_r, n).
        form: in which rows are sent.
    """

    def __init__(self, stack: Stack, own: RowMatrix, form: Any) -> None:
        super().__init__((stack.size, own.shape[1]), own.dtype, own.device)
        self.stack, self._own, self._form = stack, own, form
        none = torch.zeros(0, dtype=torch.long, device=own.device)
        self._last: tuple[Tensor, Tensor] = none, none  # rows that were sent last: which, and what was sent

    # --- products -----------------------------------------------------------------------------------------------

    def matvec(self, vector: Tensor) -> Tensor:
        return self.stack.join(lambda: self._own.matvec(vector), self, at=vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.stack.join(lambda: self._own.matmat(block), self, block.shape[1], at=block)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._sum(lambda: self._own.rmatvec(vector[self.stack.place]), vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        find = lambda: self._own.rmatmat(block[self.stack.place]).reshape(-1)
        return self._sum(find, block, self.shape[1] * block.shape[1]).view(self.shape[1], -1)

    def normal(self, vector: Tensor) -> Tensor:
        return self._sum(lambda: self._own.normal(vector), vector)

    def _sum(self, find: Callable[[], Tensor], at: Tensor | None = None, size: int | None = None) -> Tensor:
        return self.stack.processes.sum(find, self.shape[1] if size is None else size, self, at)

    # --- other matrices of the same kind ------------------------------------------------------------------------

    def in_units(self, units: Tensor) -> SharedRows:
        return SharedRows(self.stack, self._own.in_units(units), self._form)

    def above(self, rows: Tensor) -> SharedRows:
        """J, written out in each process, above other rows (m, n): those go to the last process."""
        own, counts = self._own.written_out(), list(self.stack.counts)
        if self.stack.processes.rank == len(counts) - 1:
            own = torch.cat([own, rows])
        counts[-1] += len(rows)
        return SharedRows(Stack(self.stack.processes, counts), DenseRows(own), None)

    def condensed(self) -> tuple[RowMatrix, SharedRotation | None]:
        """Of each process the triangle of its rows, where these are more than the columns; in all processes."""
        if max(self.stack.counts) <= self.shape[1]:
            return DenseRows(self.written_out()), None
        rotation = SharedRotation(self.stack, self._own)
        return DenseRows(rotation.rows), rotation

    # --- numbers ------------------------------------------------------------------------------------------------

    def squared_norm(self) -> float:
        return self._squared_norm

    @cached_property
    def _squared_norm(self) -> float:
        return float(self._sum(lambda: self._own_number(self._own.squared_norm()), size=1))

    def _own_number(self, number: float) -> Tensor:
        return torch.tensor([number], dtype=self.dtype, device=self.device)

    def column_norms(self) -> Tensor:
        return self._sum(lambda: self._own.column_norms().square()).sqrt()

    def written_out(self) -> Tensor:
        return self.rows(torch.arange(self.shape[0], device=self.device)).written_out()

    # --- rows and their products with each other ----------------------------------------------------------------

    def rows(self, index: Tensor) -> RowMatrix:
        """The rows at ``index`` (k,), in all processes."""
        return self._own.unpacked(self._sent(index), self._form)

    @cached_property
    def _packed(self) -> Tensor:
        return self._own.packed(self._form)

    def _sent(self, index: Tensor) -> Tensor:
        """Rows of any process as they are sent, (k, width); those sent last are kept."""
        known, kept = self._last
        place = torch.full((self.shape[0],), -1, device=self.device)
        place[known] = torch.arange(len(known), device=self.device)
        if len(known) and not bool((place[index] < 0).any()):
            return kept[place[index]]
        width = self._packed.shape[1]

        def part() -> Tensor:
            whole = self._packed.new_zeros(len(index), width)
            mine = (index >= self.stack.place.start) & (index < self.stack.place.stop)
            whole[mine] = self._packed[index[mine] - self.stack.place.start]
            return whole.reshape(-1)

        self._last = index, self._sum(part, index, len(index) * width).view(len(index), width)
        return self._last[1]

    def gram(self) -> SharedGram:
        return SharedGram(self)

    def gram_diagonal(self) -> Tensor:
        """‖row‖² of each, (N,)."""
        return self.stack.join(lambda: self._own.gram().diagonal(), self)

    def gram_columns(self, index: Tensor) -> Tensor:
        """J J[index]ᵀ, (N, k): each process multiplies its rows with those at ``index``."""
        sent, count = self._sent(index), self._own.shape[0]

        def find() -> Tensor:
            both = self._own.unpacked(torch.cat([self._packed, sent]), self._form)
            columns = torch.arange(count, count + len(sent), device=self.device)
            return both.gram().entries(slice(0, count), columns)

        return self.stack.join(find, self, len(sent), at=index)

    def gram_dense(self) -> Tensor:
        """J Jᵀ, (N, N): of its lower triangle each process computes as much."""
        size, processes = self.shape[0], self.stack.processes
        every = self.rows(torch.arange(size, device=self.device)).gram()
        cuts = [round(size * math.sqrt(rank / processes.size)) for rank in range(processes.size + 1)]
        share = Stack(processes, [end - start for start, end in pairwise(cuts)])

        def find() -> Tensor:
            lower = torch.zeros(share.counts[processes.rank], size, dtype=self.dtype, device=self.device)
            first, last = share.place.start, share.place.stop
            for start in range(first, last, _CHUNK):
                end = min(start + _CHUNK, last)
                columns = torch.arange(end, device=self.device)
                lower[start - first : end - first, :end] = every.entries(slice(start, end), columns)
            return lower

        whole = share.join(find, self, size)
        return whole.tril_() + whole.tril(-1).mT


class SharedGram(GramMatrix):
    """J Jᵀ for rows that are spread over processes; what `J.gram()` builds."""

    def __init__(self, rows: SharedRows) -> None:
        super().__init__(rows.shape[0], rows.dtype, rows.device)
        self._rows = rows
        self._whole: Tensor | None = None

    def matvec(self, vector: Tensor) -> Tensor:
        return self._rows.matvec(self._rows.rmatvec(vector))

    def matmat(self, block: Tensor) -> Tensor:
        """K V: by K itself, which is kept, where that is fewer numbers to send than J (Jᵀ V)."""
        if self._whole is None and block.shape[1] * sum(self._rows.shape) < self.size**2:
            return self._rows.matmat(self._rows.rmatmat(block))
        return self.dense() @ block

    def diagonal(self) -> Tensor:
        return self._rows.gram_diagonal()

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        if isinstance(rows, slice):
            return self._rows.gram_columns(columns)[rows]
        few, place = torch.cat([rows, columns]).unique(return_inverse=True)
        first, second = place.split([len(rows), len(columns)])
        return self._rows.rows(few).gram().entries(first, second)

    def principal(self, index: Tensor) -> Tensor:
        return self.dense()[index][:, index]

    def dense(self) -> Tensor:
        if self._whole is None:
            self._whole = self._rows.gram_dense()
        return self._whole


class SharedRotation:
    """The Q of J = Q B, where B are the rows of a process, or their triangle where they are more than the columns.

    Args:
        stack: how many rows each process has.
        own: those of this process.

    Attributes:
        rows: B, in all processes.

    Source: parallel TSQR with one level: Demmel, Grigori, Hoemmen, Langou, SIAM J. Sci. Comput. 34 (2012), A206-A239,
        section 3.
    """

    def __init__(self, stack: Stack, own: RowMatrix) -> None:
        count, size = own.shape
        self._stack, self._like = stack, own
        self._small = Stack(stack.processes, [min(count, size) for count in stack.counts])
        self._qr: BlockQR | None = None

        def top() -> Tensor:
            if count <= size:
                return own.written_out()
            self._qr = BlockQR(own.blocks(BLOCK))
            return self._qr.triangle

        self.rows = self._small.join(top, own, size)

    def project(self, vector: Tensor) -> Tensor:
        """Qᵀ v, (m,) of (N,)."""
        own = vector[self._stack.place]
        find = lambda: own if self._qr is None else self._qr.project(own)
        return self._small.join(find, self._like, at=vector)

    def lift(self, vector: Tensor) -> Tensor:
        """Q v, (N,) of (m,)."""
        own = vector[self._small.place]
        find = lambda: own if self._qr is None else self._qr.lift(own)
        return self._stack.join(find, self._like, at=vector)
