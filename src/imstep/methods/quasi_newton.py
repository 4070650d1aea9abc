"""Steps of an inverse Hessian learnt on the way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import StrongWolfe, TrustRegion
from imstep.methods.configured import on_hessian
from imstep.optim.between import QuasiNewtonSteps
from imstep.optim.forcing import ResidualForcing
from imstep.optim.globalized import LearntModel, PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import (
    BFGS,
    BlockBFGS,
    LimitedMemoryBFGS,
    Preconditioning,
    RankOneModel,
    SelfScaledBroyden,
)

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


def block_bfgs(
    params: Iterable[Any], columns: int = 8, blocks: int = 5, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Block BFGS: as :func:`lbfgs`, from exact products with random blocks in place of the last steps.

        d = -P g,   P A S = S for the last block S

    Args:
        params: parameters or parameter groups.
        columns: of a block.
        blocks: how many count.

    Cost: ``columns`` products and a recorded gradient, and a gradient for each trial of the search.

    Source: Gower, Goldfarb and Richtárik, ICML 2016 (arXiv 1603.09649).
    """
    return _quasi_newton(params, BlockBFGS(columns, blocks), options)


def enriched_newton(
    params: Iterable[Any], pairs: int = 30, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Newton-Krylov steps, and L-BFGS steps after any of them while these lower the loss faster for their price.

    Args:
        params: parameters or parameter groups.
        pairs: how many steps L-BFGS knows, for two vectors of memory each.

    Cost: of a Newton step that of :class:`NewtonKrylov` with its defaults; a gradient and a loss of the others.

    Source: Morales and Nocedal, Comput. Optim. Appl. 21 (2002), 143-154; what is ours: :class:`QuasiNewtonSteps`.
    """
    configuration: NewtonKrylovOptions = {"between": QuasiNewtonSteps(pairs, always=True)}
    configuration.update(options)
    return NewtonKrylov(params, **configuration)


def sr1(params: Iterable[Any], exact: bool = False, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """SR1 in a trust region: a dense model B of the Hessian, indefinite where that is, learnt by rank-one updates.

        min gᵀd + dᵀBd/2 over ‖d‖ <= Δ,   B s = y for the last step s and its change y of the gradient

    Args:
        params: parameters or parameter groups, at most 4,096 numbers.
        exact: see :func:`bfgs`.

    Cost: a gradient and a loss; no products.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 6.2; Conn, Gould and Toint, Mathematical
        Programming 50 (1991), 177-195. A step that fails is shortened, and B learns from what was taken.
    """
    return _rank_one(params, RankOneModel(None, exact), options)


def lsr1(
    params: Iterable[Any], pairs: int = 10, exact: bool = False, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """L-SR1 in a trust region: as :func:`sr1`, from the last steps alone, in compact form.

    Args:
        params: parameters or parameter groups.
        pairs: how many steps count.
        exact: see :func:`bfgs`.

    Source: Byrd, Nocedal and Schnabel, Mathematical Programming 63 (1994), 129-156; Brust, Erway and Marcia, Comput.
        Optim. Appl. 66 (2017), 245-266, for the trust region, here by GLTR, which ends after ``pairs`` + 2 dimensions.
    """
    return _rank_one(params, RankOneModel(pairs, exact), options)


def _rank_one(params: Iterable[Any], model: RankOneModel, options: NewtonKrylovOptions) -> NewtonKrylov:
    """Steps of a model of the Hessian in a trust region; products with the model are next to free."""
    method: NewtonKrylovOptions = {
        "solver": LearntModel(),
        "preconditioning": model,
        "forcing": ResidualForcing(eta=1e-4, power=1.0),
        "step": TrustRegion(),
    }
    return on_hessian(params, method, options)


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
