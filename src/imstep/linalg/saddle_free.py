"""Newton's direction with the sizes of eigenvalues in place of the eigenvalues, by products only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imstep.linalg.arguments import check_limit, check_not_negative, check_vector
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.projected import AbsoluteValues, ProjectedSearch
from imstep.linalg.result import KrylovResult
from imstep.linalg.stopping import RelativeResidual, StoppingRule
from imstep.linalg.subspace import Subspace


@full_precision
def saddle_free(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    dimension: int = 64,
    least: float = 1e-6,
) -> KrylovResult:
    """Solve (|A| + λI) x = b over a Krylov space, |A| = V |T| Vᵀ: away from saddles, along every direction downhill.

        V = span{b, A b, A² b, ...},   T = VᵀAV,   x = V (|T| + λI)⁻¹ Vᵀ b

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        damping: λ >= 0.
        stopping: rules asked after every iteration; the residual is what A x has outside the space.
        dimension: of the space, at most; >= 1.
        least: eigenvalues of T count as at least this times the largest in size, in (0, 1].

    Returns:
        A `KrylovResult` whose decreases are those of the model with |T| in place of A.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit.

    Cost: one product per iteration; 2 k + 5 vectors of size n with k <= dimension, an eigenvalue problem of size k per
        iteration.

    Source: Dauphin et al., NeurIPS 2014 (arXiv 1406.2572), Algorithm 1; stopping rules and ``least`` are our choice.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([-2.0, 1.0, 4.0]))
        >>> saddle_free(A, torch.tensor([2.0, 3.0, 4.0])).solution.round(decimals=4)
        tensor([1., 3., 1.])
    """
    check_not_negative(damping=damping)
    check_vector(operator, rhs, "saddle_free")
    check_limit(dimension)
    if dimension < 1 or not 0 < least <= 1:
        raise ValueError(f"dimension is at least 1 and least lies in (0, 1], got {dimension} and {least}.")
    problem = AbsoluteValues(operator, rhs.detach(), damping, None, least)
    size = min(dimension, operator.size)
    search = ProjectedSearch(problem, Subspace(operator, size))
    return search.result(search.grow(stopping, size))
