"""Newton's step corrected by the third derivative."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import Armijo
from imstep.methods.configured import on_hessian
from imstep.optim.forcing import ResidualForcing
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.third_order import ChebyshevHalley

if TYPE_CHECKING:
    from typing_extensions import Unpack


def halley(params: Iterable[Any], alpha: float = 0.5, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Halley's method: Newton's step d₁ corrected by the exact third derivative T; convergence of order three.

        d = d₁ - (H + α T[d₁])⁻¹ T[d₁, d₁] / 2

    Args:
        params: parameters or parameter groups.
        alpha: 1/2; 1 for super-Halley.

    Cost: of two systems; each product with the matrix of the second takes 31/3 gradients.

    Source: Gundersen and Steihaug, Optim. Methods Softw. 25 (2010), 331-342.
    """
    solver = ChebyshevHalley(alpha)
    return on_hessian(params, {"solver": solver, "forcing": ResidualForcing(power=2.0), "step": Armijo()}, options)


def super_halley(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Super-Halley's method: as :func:`halley` with α = 1."""
    return halley(params, 1.0, **options)


def chebyshev(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Chebyshev's method: as :func:`halley` with α = 0, so that a step takes one third derivative."""
    return halley(params, 0.0, **options)
