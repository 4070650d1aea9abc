"""Newton's method on the exact Hessian: what solves the system, and what safeguards the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imstep.globalization import AdaptiveCubic, Armijo, LevenbergMarquardt, TrustRegion
from imstep.linalg import AbsoluteEigenvalues, IndefiniteRule, ShiftedEigenvalues
from imstep.methods.configured import on_hessian
from imstep.optim.globalized import CubicRegularization, SaddleFree
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.solving import ConjugateGradient, Direct, GeneralizedLanczos, MinimalResidual

if TYPE_CHECKING:
    from typing_extensions import Unpack


def newton(
    params: Iterable[Any], indefinite: IndefiniteRule | None = None, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Newton's method with the dense Hessian, made positive definite where it is not, and a backtracking search.

        d = -V diag(1/θ') Vᵀ g,   θ' from the eigenvalues θ by ``indefinite``

    Args:
        params: parameters or parameter groups, at most 4,096 numbers.
        indefinite: what stands for the eigenvalues: :class:`~imstep.linalg.AbsoluteEigenvalues`, the default, or
            :class:`~imstep.linalg.ShiftedEigenvalues`.

    Cost: n products and an eigenvalue problem of size n a step.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 3.4.
    """
    solver = Direct(indefinite=indefinite or AbsoluteEigenvalues())
    return on_hessian(params, {"solver": solver, "step": Armijo()}, options)


def absolute_newton(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Modified Newton, by the sizes of the Hessian's eigenvalues: :func:`newton` with its default."""
    return newton(params, AbsoluteEigenvalues(), **options)


def shifted_newton(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Modified Newton, by a multiple of the identity added to the Hessian where it is not positive definite.

        d = -(H + τI)⁻¹ g,   τ by :class:`~imstep.linalg.ShiftedEigenvalues`

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 3.4.
    """
    return newton(params, ShiftedEigenvalues(), **options)


def newton_cg(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Truncated Newton: conjugate gradients on the Hessian until the residual is small, then a backtracking search.

        ‖H d + g‖ <= min(1/2, ‖g‖^(1/2)) ‖g‖, or until pᵀHp <= 0

    Cost: a product an iteration.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 7.1; Nash, J. Comput. Appl. Math. 124
        (2000). ‖g‖ counts relative to the largest met, so that no unit matters.
    """
    return on_hessian(params, {"solver": ConjugateGradient(), "step": Armijo()}, options)


def newton_mr(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Newton-MR: minimal residuals on the Hessian until the residual is small or curvature is not positive.

    Cost: a product an iteration.

    Source: Liu and Roosta, SIAM J. Optim. 32 (2022), arXiv 2206.05732.
    """
    return on_hessian(params, {"solver": MinimalResidual(), "step": Armijo()}, options)


def trust_region(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """A trust region on the Hessian: the model's minimiser within a radius that follows its success.

    Args:
        params: parameters or parameter groups.
        **options: ``solver`` is the subproblem's: ``GeneralizedLanczos()`` by default, ``SteihaugToint()``,
            ``Dogleg()``, ``TwoDimensionalSubspace()``, or ``Direct()`` for Moré and Sorensen's exact one.

    Cost: a product an iteration.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 4.1; Gould et al., SIAM J. Optim. 9 (1999).
    """
    return on_hessian(params, {"solver": GeneralizedLanczos(), "step": TrustRegion()}, options)


def cubic_regularization(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Adaptive cubic regularisation, ARC: the minimiser of the model and σ‖d‖³/3 over a Krylov space.

    Cost: a product an iteration; up to 32 parameters the subproblem is solved exactly.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295.
    """
    return on_hessian(params, {"solver": CubicRegularization(), "step": AdaptiveCubic()}, options)


def saddle_free_newton(
    params: Iterable[Any], dimension: int = 64, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Saddle-free Newton: -(|H| + λI)⁻¹ g over a Krylov space.

    Args:
        params: parameters or parameter groups.
        dimension: of the space, at most.

    Cost: a product an iteration.

    Source: Dauphin et al., NeurIPS 2014 (arXiv 1406.2572), Algorithm 1; their λ, chosen by trial, is Levenberg's and
        Marquardt's here, with a backtracking search.
    """
    method: NewtonKrylovOptions = {
        "solver": SaddleFree(dimension),
        "damping": LevenbergMarquardt(),
        "step": Armijo(),
    }
    return on_hessian(params, method, options)
