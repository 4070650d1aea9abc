"""Newton's method with randomised approximations of the Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import Armijo, LevenbergMarquardt
from imstep.methods.configured import on_hessian
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import Nystrom

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
