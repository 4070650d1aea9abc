"""Solves that leave out what is between parameters: the block diagonal of the curvature matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imstep.curvature.operators import ProductsOperator, SymmetricOperator
from imstep.optim.direction import Direction
from imstep.optim.record import Cost
from imstep.optim.solving import ConjugateGradient, NewtonSystem, Solver


@dataclass(frozen=True)
class BlockDiagonal(Solver):
    """Conjugate gradients on the diagonal blocks of the matrix, a block for each parameter (weight, bias).

        (A_pp + λI) d_p = -g_p   for every parameter p,   and then the length of d by the whole of A

    With Gauss-Newton matrices it shows what curvature *between* layers is worth, layer-wise Gauss-Newton beside the
    full one. It costs more than the full one: products with all blocks take up to as many whole products as there are
    parameters, and are charged so.

    Source: Zhang, Xiong, Bradbury and Socher, arXiv 1712.07296, for the method; Abreu, Vyas, Kakade and Morwani, arXiv
        2510.09378, for the question. The length by the whole matrix is our choice.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        whole = system.operator
        if not isinstance(whole, SymmetricOperator):
            raise TypeError(
                f"BlockDiagonal() takes blocks of a matrix that belongs to parameters, and {type(whole).__name__} is "
                "none. Use it as the solver of NewtonKrylov."
            )
        blocks = whole.block_diagonal("parameter")
        found = ConjugateGradient().solve(replace(system, operator=blocks))
        products = sum(block.products for block in blocks.blocks.values() if isinstance(block, ProductsOperator))
        cost = Cost(gauss_newton_products=products) if whole.definite else Cost(hessian_products=products)
        found = found.moved(found.vector, whole @ found.vector, system.gradient)
        return replace(found, cost=found.cost + cost)
