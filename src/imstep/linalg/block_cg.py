"""Conjugate gradients for several right-hand sides, a block of products at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import IndefinitePreconditionerError
from imstep.linalg.dots import row_dots
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """Solutions, one a row, (k, n), why each ended, and the products that were spent."""

    solution: Tensor
    statuses: tuple[KrylovStatus, ...]
    products: int


def block_conjugate_gradient(
    operator: LinearOperator,
    rhs: Tensor,
    damping: float,
    preconditioner: LinearOperator | None,
    rtol: float,
    max_iterations: int,
) -> BlockSolution:
    """Solve (A + λI) x = b for each row b of (k, n), each by its own conjugate gradients, all in step.

    A row leaves the block when its residual is at most rtol ‖b‖, or at the first direction of negative or vanishing
    curvature; the solution is then that before.

    Raises:
        IndefinitePreconditionerError: the preconditioner is not positive definite.

    Cost: a product an iteration and row; 4 vectors a row, 5 with a preconditioner.

    Source: as :func:`~imstep.linalg.conjugate_gradient`. Rows share no directions: to let them would need
    orthogonalisation of the block, and rows that end early to be taken out of it.
    """
    solution = torch.zeros_like(rhs)
    statuses = [KrylovStatus.CONVERGED] * len(rhs)
    norms = row_dots(rhs, rhs).sqrt()
    running = (norms > 0).nonzero()[:, 0]
    x, r = solution[running], rhs[running].clone()
    z = _applied(preconditioner, r)
    p, rho, products = z.clone(), row_dots(r, z), 0
    if bool((rho <= 0).any()):
        raise IndefinitePreconditionerError(float(rho.min()))
    for _ in range(max_iterations):
        if not len(running):
            break
        image = operator.matmat(p.mT).mT + damping * p
        products += len(p)
        curvature, squares = row_dots(p, image), row_dots(p, p)
        # Below the rounding of its own inner product a curvature has no sign.
        level = 10 * torch.finfo(rhs.dtype).eps * (squares.sqrt() * row_dots(image, image).sqrt())
        bad = ~(curvature > level)
        step = torch.where(bad, 0.0, rho / curvature)
        x = x + step.to(x)[:, None] * p
        r = r - step.to(r)[:, None] * image
        sizes = row_dots(r, r).sqrt()
        z = _applied(preconditioner, r)
        following = row_dots(r, z)
        finite = torch.isfinite(sizes) & torch.isfinite(curvature) & torch.isfinite(following)
        done = bad | ~finite | (sizes <= rtol * norms[running])
        for at in done.nonzero()[:, 0].tolist():
            row = int(running[at])
            solution[row] = x[at].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            statuses[row] = (
                KrylovStatus.NON_FINITE if not bool(finite[at])
                else KrylovStatus.DISTURBING_NEGATIVE_CURVATURE if bool(bad[at])
                else KrylovStatus.CONVERGED
            )  # fmt: skip
        on = (~done).nonzero()[:, 0]
        if len(on) < len(running):
            x, r, z, p = x[on], r[on], z[on], p[on]
            running, rho, following = running[on], rho[on], following[on]
        p = z + (following / rho).to(z)[:, None] * p
        rho = following
    for at, row in enumerate(running.tolist()):
        solution[row], statuses[row] = x[at], KrylovStatus.MAX_ITERATIONS
    return BlockSolution(solution, tuple(statuses), products)


def _applied(preconditioner: LinearOperator | None, rows: Tensor) -> Tensor:
    return rows if preconditioner is None else preconditioner.matmat(rows.mT).mT
