"""Conjugate gradients without termination at disturbing directions: what the ablations compare with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import KrylovResult, KrylovStatus, Progress
from imstep.linalg.stopping import first_answer
from imstep.optim import NewtonSystem, Solver
from imstep.optim.direction import Direction, descent


@dataclass(frozen=True)
class Unguarded(Solver):
    """The recurrences of conjugate gradients, taken as they are whatever the sign of pᵀ(A + λI)p.

    On a positive definite matrix this is `ConjugateGradient`. On an indefinite one the iterates tend to a saddle of the
    model rather than to a minimum, and may be no directions of descent; the optimizer then takes -g.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        return descent(system.operator, system.gradient, unguarded_solve(system))


def unguarded_solve(system: NewtonSystem) -> KrylovResult:
    """(A + λI) x = -g as far as the stopping rules want."""
    x, image = torch.zeros_like(system.gradient), torch.zeros_like(system.gradient)
    residual = -system.gradient
    z = _preconditioned(system, residual)
    p, descent_rate = z, float(residual @ z)
    decreases, rhs_norm, products = [0.0], float(residual.norm()), 0
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=system.keep_pairs)
    status: KrylovStatus | None = None
    while status is None:
        p_image = system.operator @ p
        products += 1
        pairs.append((p, p_image))
        curvature = float(p @ p_image) + system.damping * float(p @ p)
        step = descent_rate / curvature if curvature else math.inf
        if not math.isfinite(step):
            status = KrylovStatus.NON_FINITE
            break
        x, image = torch.add(x, p, alpha=step), torch.add(image, p_image, alpha=step)
        residual = residual - step * (p_image + system.damping * p)
        decreases.append(decreases[-1] + step * descent_rate / 2)
        status = first_answer(system.stopping, Progress(products, float(residual.norm()), rhs_norm, decreases))
        z = _preconditioned(system, residual)
        before, descent_rate = descent_rate, float(residual @ z)
        p = torch.add(z, p, alpha=descent_rate / before)
    return KrylovResult(
        solution=x,
        image=image,
        status=status,
        iterations=len(decreases) - 1,
        products=products,
        residual_norm=float(residual.norm()),
        predicted_decrease=decreases[-1] + system.damping * float(x @ x) / 2,
        damped_decrease=decreases[-1],
        curvature=float(x @ image),
        decreases=tuple(decreases),
        pairs=tuple(pairs),
    )


def _preconditioned(system: NewtonSystem, residual: Tensor) -> Tensor:
    return residual if system.preconditioner is None else system.preconditioner @ residual
