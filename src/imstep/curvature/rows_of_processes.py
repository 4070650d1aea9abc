"""Products with a matrix of which each process holds some rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from imstep.curvature.parameters import TensorVector
from imstep.curvature.processes import Processes
from imstep.curvature.products import Products
from imstep.linalg.sharded import in_whole


class _OfProcesses(Products):
    """Products that are put together from those of processes, by one all-reduce.

    Args:
        processes: that hold the rows.
        own: products with the rows of this process, or with their transpose; None where it has none.
        rows, columns: see :class:`Products`.
        place: where the rows of this process are among all.
        guard: raises where a product would be out of date.
    """

    def __init__(
        self,
        processes: Processes,
        own: Products | None,
        rows: TensorVector,
        columns: TensorVector,
        place: slice,
        guard: Callable[[], None],
    ) -> None:
        super().__init__(rows, columns)
        self._processes, self._own, self._place, self._guard = processes, own, place, guard
        self.nbytes = 0 if own is None else own.nbytes

    def one(self, direction: Tensor) -> Tensor:
        return self.several(direction.unsqueeze(0)).squeeze(0)

    def _checked(self) -> Products | None:
        """This process's own; raises where it is out of date, inside of a sum only."""
        if self._own is not None:
            self._guard()
            self._own.check()
        return self._own


class GatheredProducts(_OfProcesses):
    """Products with the matrix: each process adds its entries."""

    def several(self, directions: Tensor) -> Tensor:
        directions = in_whole(directions)

        def own() -> Tensor | None:
            products = self._checked()
            return None if products is None else products.several(directions)

        return self.placed(own, len(directions), directions)

    def placed(self, own: Callable[[], Tensor | None], count: int, directions: Tensor | None) -> Tensor:
        """``count`` vectors (count, m) of all rows, from what each process has of them."""

        def part() -> Tensor | None:
            found = own()
            if found is None:
                return None
            whole = found.new_zeros(count, self.rows.size, dtype=self.rows.dtype)
            whole[:, self._place] = found
            return whole.reshape(-1)

        return self._processes.sum(part, count * self.rows.size, self.rows, directions).view(count, -1)


class ScatteredProducts(_OfProcesses):
    """Products with the transpose: each process multiplies its entries, and the products are added up."""

    def several(self, directions: Tensor) -> Tensor:
        def part() -> Tensor | None:
            products = self._checked()
            return None if products is None else products.several(directions[:, self._place].contiguous()).reshape(-1)

        size = len(directions) * self.rows.size
        return self._processes.sum(part, size, self.rows, directions).view(len(directions), -1)
