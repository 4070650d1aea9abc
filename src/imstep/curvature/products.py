"""Products of a matrix that belongs to tensors, with flat vectors: where they come from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from imstep.complexstep.tape import Tape
from imstep.curvature.parameters import TensorVector

_ROOM = {False: 2**20, True: 2**28}
"""Bytes, on CPU and GPU, within which k directions together are faster than one by one.

Of the mean intermediate value: replays of many small ones take their time for each, which directions together share,
however large the one is that a loop has gathered. Measured on CPU: beyond the caches a block gains nothing, takes k
times the memory, and what it drops goes back to the system rather than to the next value. A GPU gains as long as it is
not filled.
"""

_MOST = {False: 2**25, True: 2**30}
"""Bytes for the largest."""


class Products(ABC):
    """Products with a matrix of shape (m, n).

    Args:
        rows: the vector (m,) that a product is.
        columns: the vector (n,) that it is made with.
    """

    nbytes = 0
    """Bytes that the products keep alive between them, parameters included."""

    fixed = False
    """Whether each product runs the same operators on the same memory."""

    streams = False
    """Whether a product along a sharded vector is summed over processes part by part as it is made, see `UnitVector`.
    """

    def __init__(self, rows: TensorVector, columns: TensorVector) -> None:
        self.rows, self.columns = rows, columns

    @abstractmethod
    def one(self, direction: Tensor) -> Tensor:
        """The product (m,) with one direction (n,)."""

    def several(self, directions: Tensor) -> Tensor:
        """The products (k, m) with directions (k, n), k > 0; by default one by one."""
        return torch.stack([self.one(direction) for direction in directions])

    def block(self, rows: Sequence[int], columns: Sequence[int]) -> Products:
        """Products with the sub-matrix of some of the tensors, by position."""
        return PaddedProducts(self, rows, columns)

    def check(self) -> None:
        """Raise :class:`~imstep.complexstep.tape.TapeChangedError` if what they need was overwritten; else nothing."""
        return None

    def tapes(self) -> list[tuple[float, Tape]] | None:
        """Weights and tapes whose products add up to these; None where they are something else."""
        return None


class ReplayedProducts(Products):
    """Products by replay of a tape whose inputs and outputs are the tensors.

    Args:
        tape: from the tensors of ``columns`` to those of ``rows``.
        rows, columns: see :class:`Products`.
    """

    fixed = streams = True

    def __init__(self, tape: Tape, rows: TensorVector, columns: TensorVector) -> None:
        super().__init__(rows, columns)
        self._tape, self.nbytes = tape, tape.nbytes

    def one(self, direction: Tensor) -> Tensor:
        return self.rows.assembled(self._tape.stream(self.columns.unflatten(direction)), direction)

    def several(self, directions: Tensor) -> Tensor:
        made = directions.new_empty(len(directions), self.rows.size, dtype=self.rows.dtype)
        at_once = self._at_once()
        for given, into in zip(directions.split(at_once), made.split(at_once), strict=True):
            given = given.contiguous()
            if len(given) == 1:
                self._into(given[0], into[0])
            else:
                with warnings.catch_warnings():  # of operators without a batching rule, which no user has called
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    torch.vmap(self._into)(given, into)
        return made

    def _into(self, direction: Tensor, product: Tensor) -> Tensor:
        """Write the product over ``product``."""
        return self.rows.write(self._tape.stream(self.columns.unflatten(direction)), product)

    def _at_once(self) -> int:
        """How many directions to replay together: as many as intermediate values have room for."""
        if self._tape.exchanges:
            return 1
        there = self.columns.device.type != "cpu"
        mean, largest = self._tape.sizes
        return max(1, min(_ROOM[there] // max(mean, 1), _MOST[there] // max(largest, 1)))

    def block(self, rows: Sequence[int], columns: Sequence[int]) -> Products:
        return ReplayedProducts(self._tape.restricted(columns, rows), self.rows.part(rows), self.columns.part(columns))

    def tapes(self) -> list[tuple[float, Tape]] | None:
        return [(1.0, self._tape)]

    def check(self) -> None:
        self._tape.check()


class ShiftedProducts(Products):
    """Products with A + diag(s), given those with A.

    Args:
        products: with A, (n, n).
        diagonal: s, (n,).
    """

    def __init__(self, products: Products, diagonal: Tensor) -> None:
        super().__init__(products.rows, products.columns)
        self._products, self._diagonal, self.nbytes = products, diagonal, products.nbytes
        self.fixed = products.fixed

    def one(self, direction: Tensor) -> Tensor:
        return self._products.one(direction).addcmul_(self._diagonal, direction)

    def several(self, directions: Tensor) -> Tensor:
        return self._products.several(directions).addcmul_(self._diagonal, directions)

    def check(self) -> None:
        self._products.check()


class RecomputedProducts(Products):
    """Products each by an evaluation of its own; nothing is kept between them.

    Args:
        product: makes one.
        rows, columns: see :class:`Products`.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], rows: TensorVector, columns: TensorVector) -> None:
        super().__init__(rows, columns)
        self._product = product

    def one(self, direction: Tensor) -> Tensor:
        return self._product(direction)


class SummedProducts(Products):
    """Products with a sum of matrices, each with its weight.

    Args:
        parts: weights and products, of the same rows and columns.
    """

    def __init__(self, parts: Sequence[tuple[float, Products]]) -> None:
        super().__init__(parts[0][1].rows, parts[0][1].columns)
        self._parts = list(parts)
        self.nbytes = sum(part.nbytes for _, part in parts)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return all(part.streams for _, part in self._parts)

    def one(self, direction: Tensor) -> Tensor:
        return self._sum(self._weighed(weight, part, direction) for weight, part in self._parts)

    def _weighed(self, weight: float, part: Products, direction: Tensor) -> Tensor:
        with self.rows.weighing(weight):
            return weight * part.one(direction)

    def several(self, directions: Tensor) -> Tensor:
        return self._sum(weight * part.several(directions) for weight, part in self._parts)

    @staticmethod
    def _sum(terms: Iterator[Tensor]) -> Tensor:
        total = next(terms)
        for term in terms:
            total += term
        return total

    def block(self, rows: Sequence[int], columns: Sequence[int]) -> Products:
        return SummedProducts([(weight, part.block(rows, columns)) for weight, part in self._parts])

    def tapes(self) -> list[tuple[float, Tape]] | None:
        found = []
        for weight, part in self._parts:
            own = part.tapes()
            if own is None:
                return None
            found += [(weight * factor, tape) for factor, tape in own]
        return found

    def check(self) -> None:
        for _, part in self._parts:
            part.check()


class StackedProducts(Products):
    """Products with matrices below each other, of the same columns.

    Args:
        parts: products with each.
    """

    def __init__(self, parts: Sequence[Products]) -> None:
        forms = [form for part in parts for form in part.rows.forms]
        super().__init__(TensorVector(forms, parts[0].rows.dtype, parts[0].rows.device), parts[0].columns)
        self._parts = list(parts)
        self.nbytes, self.fixed = sum(part.nbytes for part in parts), all(part.fixed for part in parts)

    def one(self, direction: Tensor) -> Tensor:
        return torch.cat([part.one(direction) for part in self._parts])

    def several(self, directions: Tensor) -> Tensor:
        return torch.cat([part.several(directions) for part in self._parts], dim=1)

    def block(self, rows: Sequence[int], columns: Sequence[int]) -> Products:
        # Each part's rows belong to one tensor: its outputs.
        return StackedProducts([self._parts[at].block([0], columns) for at in rows])

    def check(self) -> None:
        for part in self._parts:
            part.check()


class JoinedProducts(Products):
    """Products with matrices beside each other, of the same rows: the transpose of :class:`StackedProducts`.

    Args:
        parts: products with each.
    """

    def __init__(self, parts: Sequence[Products]) -> None:
        forms = [form for part in parts for form in part.columns.forms]
        super().__init__(parts[0].rows, TensorVector(forms, parts[0].columns.dtype, parts[0].columns.device))
        self._parts, self._sizes = list(parts), [part.columns.size for part in parts]
        self.nbytes, self.fixed = sum(part.nbytes for part in parts), all(part.fixed for part in parts)

    def one(self, direction: Tensor) -> Tensor:
        return self.several(direction.unsqueeze(0)).squeeze(0)

    def several(self, directions: Tensor) -> Tensor:
        total = directions.new_zeros(len(directions), self.rows.size)
        for part, own in zip(self._parts, directions.split(self._sizes, dim=1), strict=True):
            total += part.several(own)
        return total

    def block(self, rows: Sequence[int], columns: Sequence[int]) -> Products:
        return JoinedProducts([self._parts[at].block(rows, [0]) for at in columns])

    def check(self) -> None:
        for part in self._parts:
            part.check()


class PaddedProducts(Products):
    """Products with a sub-matrix by those with the whole: zeros put in, entries picked out.

    Args:
        whole: products with the whole matrix.
        rows, columns: positions of the tensors that make up the sub-matrix.
    """

    def __init__(self, whole: Products, rows: Sequence[int], columns: Sequence[int]) -> None:
        super().__init__(whole.rows.part(rows), whole.columns.part(columns))
        self._whole = whole
        self._picked, self._filled = whole.rows.entries(rows), whole.columns.entries(columns)

    def one(self, direction: Tensor) -> Tensor:
        return self.several(direction.unsqueeze(0)).squeeze(0)

    def several(self, directions: Tensor) -> Tensor:
        padded = directions.new_zeros(len(directions), self._whole.columns.size)
        padded[:, self._filled] = directions
        return self._whole.several(padded)[:, self._picked]

    def check(self) -> None:
        self._whole.check()
