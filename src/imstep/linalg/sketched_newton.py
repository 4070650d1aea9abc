"""Newton's step within a given subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative, check_vector
from imstep.linalg.dense import IndefiniteRule, dense_solve
from imstep.linalg.explicit import DenseOperator
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult, measured_result


@full_precision
def sketched_newton(
    operator: LinearOperator,
    rhs: Tensor,
    sketch: Tensor,
    *,
    damping: float = 0.0,
    indefinite: IndefiniteRule | None = None,
) -> KrylovResult:
    """Solve (A + λI) x = b within the range of a matrix S.

        x = S (Sᵀ(A + λI)S)⁻¹ Sᵀb

    Args:
        operator: A, self-adjoint, size n.
        rhs: b, (n,).
        sketch: S, (n, s), of full rank.
        damping: λ >= 0.
        indefinite: what stands for the eigenvalues of the small matrix where it is not positive definite; see
            :func:`dense_solve`.

    Returns:
        A `KrylovResult`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Cost: s products, as one block.

    Source: Gower, Kovalev, Lieder and Richtárik, NeurIPS 2019 (arXiv 1905.10874), Algorithm 1; an orthonormal basis of
        S in place of S changes nothing, and keeps digits.

    Example:
        >>> A = DenseOperator(torch.tensor([2.0, 5.0, 1.0]).diag())
        >>> sketched_newton(A, torch.ones(3), torch.eye(3)[:, :2]).solution
        tensor([0.5000, 0.2000, 0.0000])
    """
    check_not_negative(damping=damping)
    check_vector(operator, rhs, "sketched_newton")
    basis = torch.linalg.qr(sketch)[0]
    images = operator.matmat(basis)
    small = dense_solve(DenseOperator(basis.mT @ images), basis.mT @ rhs, damping=damping, indefinite=indefinite)
    solution, image = basis @ small.solution, images @ small.solution
    return measured_result(
        damping,
        solution,
        image,
        status=small.status,
        iterations=small.iterations,
        products=basis.shape[1],
        residual_norm=float((rhs - image - damping * solution).norm()),
        decreases=small.decreases,
    )
