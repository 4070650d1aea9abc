"""Steps of an inverse Hessian learnt on the way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import StrongWolfe
from imstep.methods.configured import on_hessian
from imstep.optim.globalized import PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import BFGS, LimitedMemoryBFGS, Preconditioning, SelfScaledBroyden

if TYPE_CHECKING:
    from typing_extensions import Unpack


def bfgs(params: Iterable[Any], exact: bool = False, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """BFGS: a dense inverse Hessian learnt from differences of gradients, and a strong Wolfe search.

        d = -H g,   H y = s for the last step s and its change y of the gradient

    Args:
        params: parameters or parameter groups, at most 4,096 numbers.
        exact: learn from exact products y = A s, one a step, in place of differences.

    Cost: a gradient, and one for each trial of the search.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 6.1.
    """
    return _quasi_newton(params, BFGS(exact=exact), options)


def lbfgs(
    params: Iterable[Any], pairs: int = 10, exact: bool = False, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """L-BFGS: as :func:`bfgs`, from the last steps alone.

    Args:
        params: parameters or parameter groups.
        pairs: how many steps count.
        exact: see :func:`bfgs`.

    Source: Liu and Nocedal, Mathematical Programming 45 (1989), 503-528.
    """
    return _quasi_newton(params, LimitedMemoryBFGS(pairs, exact), options)


def self_scaled_broyden(
    params: Iterable[Any], exact: bool = False, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Self-scaled Broyden: as :func:`bfgs`, with another member of the family, and H scaled before every update.

    Source: Urbán, Stefanou and Pons, arXiv 2405.04230; Kiyani et al., arXiv 2501.16371.
    """
    return _quasi_newton(params, SelfScaledBroyden(exact), options)


def _quasi_newton(
    params: Iterable[Any], preconditioning: Preconditioning, options: NewtonKrylovOptions
) -> NewtonKrylov:
    """Steps of an approximate inverse Hessian alone."""
    method: NewtonKrylovOptions = {
        "solver": PreconditionedGradient(products=False),
        "preconditioning": preconditioning,
        "step": StrongWolfe(),
    }
    return on_hessian(params, method, options)
