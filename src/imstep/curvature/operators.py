"""Linear operators over a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from imstep.complexstep.report import OperatorReport
from imstep.complexstep.tape import Tape
from imstep.curvature.evaluation import Point
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.products import Products, ReplayedProducts, ShiftedProducts
from imstep.curvature.static import Capture, StaticProducts, cuda_graph
from imstep.curvature.trace_parts import parts_of
from imstep.curvature.unmoved import Unmoved
from imstep.linalg import BlockDiagonalOperator, LinearOperator
from imstep.linalg.parts import TraceParts
from imstep.linalg.space import Space


class ProductsOperator(LinearOperator):
    """A matrix by its products and those of its transpose; counts them.

    Args:
        forward: products with the matrix.
        transposed: products with its transpose.
        guard: raises where a product would be out of date.

    Attributes:
        products: how many products were made, transposed ones included, a block of k counting k.
    """

    def __init__(self, forward: Products, transposed: Products, guard: Callable[[], None] = lambda: None) -> None:
        vector = forward.columns
        super().__init__((forward.rows.size, vector.size), vector.dtype, vector.device)
        self._forward, self._transposed, self._guard = forward, transposed, guard
        self._sources = (forward,) if forward is transposed else (forward, transposed)
        self.products = 0

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self._forward.rows.space, self._forward.columns.space

    @property
    def nbytes(self) -> int:
        """Bytes that recorded derivatives keep alive, the parameters included."""
        return sum(source.nbytes for source in self._sources)

    @property
    def streams(self) -> bool:
        """See :class:`~imstep.curvature.products.Products`."""
        return self._forward.streams

    def check(self) -> None:
        """Raise :class:`TapeChangedError` if the point is not the one that was recorded any more."""
        for source in self._sources:
            source.check()
        self._guard()

    def static(self, capture: Capture = cuda_graph) -> ProductsOperator:
        """The same matrix, its products captured as a CUDA graph: a GPU is given all operators of one at once.

        A small network's product takes as long as Python takes to give a GPU its operators one by one; a graph is
        given as a whole. Blocks of products go the way they went.

        Args:
            capture: how; :func:`~imstep.curvature.static.cuda_graph`, or what does the same on another device.

        Returns:
            An operator on the same vectors, which belongs to the same point.

        Raises:
            ValueError: the vectors are not on a GPU, or products are not replays of one record.
            RuntimeError: an operator on the way cannot be captured.

        Cost: four products, and the memory that one needs, held as long as the operator. Worth it for dozens of
            products at one point, such as those of a spectrum.

        Source: our own, on PyTorch's CUDA graphs. Not tried on a GPU yet.
        """
        forward, transposed = self._captured(capture)
        return ProductsOperator(forward, transposed, self.check)

    def _captured(self, capture: Capture) -> tuple[Products, Products]:
        forward = StaticProducts(self._forward, capture)
        symmetric = self._transposed is self._forward
        return forward, forward if symmetric else StaticProducts(self._transposed, capture)

    def matvec(self, vector: Tensor) -> Tensor:
        return self._one(self._forward, vector)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._one(self._transposed, vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self._several(self._forward, block)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self._several(self._transposed, block)

    def _one(self, products: Products, vector: Tensor) -> Tensor:
        self.check()
        self.products += 1
        with torch.no_grad():
            return products.one(vector)

    def _several(self, products: Products, block: Tensor) -> Tensor:
        self.check()
        self.products += block.shape[1]
        if block.shape[1] == 0:
            return block.new_empty(products.rows.size, 0)
        with torch.no_grad():
            return products.several(block.t()).t()


class SymmetricOperator(ProductsOperator):
    """A symmetric matrix over a model's parameters.

    Args:
        parameters: the vector that it multiplies.
        source: its products.
        definite: whether the matrix is known to be positive semidefinite.
        guard: raises where a product would be out of date.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        source: Products,
        definite: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(source, source, guard)
        self.parameters, self.definite = parameters, definite

    def held(self, vector: Tensor) -> Tensor:
        return self.parameters.own(vector)

    def static(self, capture: Capture = cuda_graph) -> SymmetricOperator:
        return SymmetricOperator(self.parameters, self._captured(capture)[0], self.definite, self.check)

    def block(
        self, rows: nn.Module | Iterable[Tensor], columns: nn.Module | Iterable[Tensor] | None = None
    ) -> ProductsOperator:
        """The sub-matrix of some of the parameters, an operator on their part of the vector.

        Args:
            rows: a module or an iterable of parameters, all among those of this operator; in the order given.
            columns: likewise; without them those of ``rows``: a diagonal block.

        Raises:
            ValueError: a parameter is not among those of this operator.

        Cost: at most a product with the whole matrix; the steps of a record that lead from ``columns`` to ``rows``.
        """
        below = self.parameters.positions(rows)
        if columns is None:
            source = self._forward.block(below, below)
            return ProductsOperator(source, source, self.check)
        across = self.parameters.positions(columns)
        return ProductsOperator(self._forward.block(below, across), self._forward.block(across, below), self.check)

    def diagonal_blocks(self, by: str) -> dict[str, LinearOperator]:
        return {name: self.block(own) for name, own in self.parameters.groups(by).items()}

    def trace_parts(self) -> TraceParts | None:
        self.check()
        return parts_of(self, self._forward.tapes())

    def block_diagonal(self, by: str = "layer") -> BlockDiagonalOperator:
        """The matrix without what is outside of the diagonal blocks of layers or parameters.

        Args:
            by: "layer" or "parameter".

        Cost: a product with each block; its inverse solves each by itself.
        """
        return BlockDiagonalOperator(
            self.diagonal_blocks(by), self.parameters.places(by), self.size, space=self.parameters
        )


class TapeOperator(SymmetricOperator):
    """A symmetric matrix whose products are replays of a tape from parameters to gradients.

    Args:
        parameters: the vector that the tape's inputs and outputs are parts of.
        tape: its inputs and outputs are the parameters' directions and the gradient's derivative.
        definite: whether the matrix is known to be positive semidefinite.
        penalty: whose curvature is added to that of the tape; None for nothing.
    """

    def __init__(
        self, parameters: ParameterVector, tape: Tape, definite: bool = False, penalty: Penalty | None = None
    ) -> None:
        source: Products = ReplayedProducts(tape, parameters, parameters)
        source = source if penalty is None else ShiftedProducts(source, penalty.factors)
        super().__init__(parameters, source, definite)
        self.tape, self.penalty = tape, penalty


class PointOperator(SymmetricOperator):
    """A curvature matrix together with what the evaluation of the closure has shown.

    Args:
        parameters: the vector that it multiplies.
        point: what the evaluation has shown.
        guard: raises where a product would be out of date; None to look if the parameters have moved.

    Attributes:
        loss: f(w), a 0-dim tensor.
        gradient: ∇f(w), (n,).
        definite: whether the matrix is known to be positive semidefinite.
        recomputes: why products evaluate the closure anew, a sentence; None where a record is replayed.
        products: how many products were made, a block of k counting k.
    """

    def __init__(self, parameters: ParameterVector, point: Point, guard: Callable[[], None] | None = None) -> None:
        super().__init__(parameters, point.source, point.definite, guard or Unmoved(parameters))
        self.loss, self.gradient, self.recomputes = point.loss, point.gradient, point.recomputes
        self._report = point.report

    def explain(self) -> OperatorReport:
        """The operators that the closure met, how often, and how each was differentiated.

        Where products are recomputed, those of the last one, and the reason.
        """
        return self._report()
