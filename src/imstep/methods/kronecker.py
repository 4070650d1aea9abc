"""Steps of Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import FixedStep, LevenbergMarquardt
from imstep.methods.configured import on_gauss_newton
from imstep.optim.forcing import FixedProducts
from imstep.optim.globalized import PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import Kronecker

if TYPE_CHECKING:
    from typing_extensions import Unpack


def kfac(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """K-FAC: Kronecker factors alone give the direction; the exact model gives its length and the momentum.

        [α, β] = argmin over α d + β e of the damped model,   d = -P g,   e the last step

    Cost: two products a step.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), sections 6.4 and 7; factors of Gauss-Newton.
    """
    method: NewtonKrylovOptions = {
        "solver": PreconditionedGradient(),
        "forcing": FixedProducts(1),
        "damping": LevenbergMarquardt(initial=1.0, factor=1.2),
        "preconditioning": Kronecker(),
        "step": FixedStep(),
        "momentum": True,
    }
    return on_gauss_newton(params, method, options)
