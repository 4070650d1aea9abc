"""Newton's method with randomised approximations of the Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import Armijo, LevenbergMarquardt
from imstep.methods.configured import on_hessian
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import Nystrom
from imstep.optim.randomized import RandomSubspace

if TYPE_CHECKING:
    from typing_extensions import Unpack


def randomized_subspace_newton(
    params: Iterable[Any], dimension: int = 32, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Randomised subspace Newton, RSN: the exact Newton step within a random subspace, another one every step.

        d = -S (SᵀHS)⁻¹ Sᵀg

    Args:
        params: parameters or parameter groups.
        dimension: of the subspace.

    Cost: ``dimension`` products a step, as one block.

    Source: Gower, Kovalev, Lieder and Richtárik, NeurIPS 2019 (arXiv 1905.10874); a backtracking search in place of
        the inverse of their relative smoothness.
    """
    return on_hessian(params, {"solver": RandomSubspace(dimension), "step": Armijo()}, options)


def nystrom_newton_cg(params: Iterable[Any], rank: int = 60, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """NysNewton-CG: conjugate gradients on the Hessian, preconditioned by a randomised low-rank approximation.

    Args:
        params: parameters or parameter groups.
        rank: of the approximation.

    Source: Rathore et al., ICML 2024 (arXiv 2402.01868), Algorithm 4 and its defaults: rank 60, made anew every 20
        steps, Armijo search.
    """
    method: NewtonKrylovOptions = {
        "preconditioning": Nystrom(rank=rank, every=20),
        "damping": LevenbergMarquardt(),
        "step": Armijo(),
    }
    return on_hessian(params, method, options)
