"""A matrix of blocks on the diagonal, each of some of the entries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from imstep.linalg.inverse import DirectSolver, InverseOperator, inverse
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus
from imstep.linalg.space import Space, known


class BlockDiagonalOperator(LinearOperator):
    """Symmetric blocks on the diagonal of a matrix that is zero elsewhere; what `A.block_diagonal("layer")` builds.

    Args:
        blocks: the blocks, by name.
        places: the entries that each belongs to, whole numbers (k,), which do not overlap.
        size: n.
        space: what the entries stand for.

    Raises:
        ValueError: there are no blocks, or one is not as large as its entries are many.

    Cost: a product with each block.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> block = DenseOperator(torch.tensor([[1.0, 2.0], [2.0, 0.0]]))
        >>> BlockDiagonalOperator({"only": block}, {"only": torch.tensor([2, 0])}, size=3) @ torch.ones(3)
        tensor([2., 0., 3.])
    """

    def __init__(
        self,
        blocks: Mapping[str, LinearOperator],
        places: Mapping[str, Tensor],
        size: int,
        space: Space | None = None,
    ) -> None:
        if not blocks or any(block.size != len(places[name]) for name, block in blocks.items()):
            sizes = {name: (block.shape, len(places[name])) for name, block in blocks.items()}
            raise ValueError(f"each block is as large as its entries are many, got shapes and counts {sizes}.")
        first = next(iter(blocks.values()))
        super().__init__(size, first.dtype, first.device)
        self.blocks, self.places, self._space = dict(blocks), dict(places), space

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self._space, self._space

    def diagonal_blocks(self, by: str) -> dict[str, LinearOperator]:
        own = known(self._space, self).places(by)
        same = lambda name: name in self.places and torch.equal(self.places[name], own[name])
        return {name: self.blocks[name] if same(name) else self.submatrix(at) for name, at in own.items()}

    def matvec(self, vector: Tensor) -> Tensor:
        product = torch.zeros_like(vector)
        for name, block in self.blocks.items():
            product[self.places[name]] = block.matvec(vector[self.places[name]])
        return product

    def matmat(self, block: Tensor) -> Tensor:
        rows = block.mT
        product = torch.zeros_like(rows)
        for name, own in self.blocks.items():
            product[:, self.places[name]] = own.matmat(rows[:, self.places[name]].mT).mT
        return product.mT

    def direct_solver(self, damping: float, rtol: float | None, max_iterations: int) -> DirectSolver:
        """Each block by itself, without the preconditioner of the whole."""
        inverses = {
            name: inverse(block, damping, rtol=rtol, max_iterations=max_iterations)
            for name, block in self.blocks.items()
        }
        return _BlockByBlock(inverses, self.places, damping)


class _BlockByBlock(DirectSolver):
    """The systems of each block by itself."""

    def __init__(self, inverses: dict[str, InverseOperator], places: dict[str, Tensor], damping: float) -> None:
        self._inverses, self._places, self._damping = inverses, places, damping

    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        # Where there is no block the matrix is λI.
        solution = rows / self._damping if self._damping > 0 else torch.zeros_like(rows)
        statuses = [KrylovStatus.CONVERGED] * len(rows)
        for name, own in self._inverses.items():
            found = own.solve(rows[:, self._places[name]].mT)
            solution[:, self._places[name]] = found.solution.mT
            statuses = [
                status if status is not KrylovStatus.CONVERGED else other
                for status, other in zip(statuses, found.statuses, strict=True)
            ]
        return solution, statuses
