"""Known second-order methods by name: functions that put the parts of `imstep` together as a paper has them.

Each returns a configured optimizer, mostly a :class:`~imstep.NewtonKrylov`; ``optimizer.step(closure)`` takes a step.
Keyword arguments are those of its constructor, in place of the method's own.

Example:
    >>> import torch
    >>> from imstep import methods
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = methods.cubic_regularization([w])
    >>> for _ in range(100):
    ...     loss = optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    >>> [round(x, 6) for x in w.tolist()]
    [1.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.curvature.choice import ExactHessian, GaussNewtonFirst
from imstep.globalization import (
    AdaptiveCubic,
    Armijo,
    LevenbergMarquardt,
    NoDamping,
    StrongWolfe,
    TrustRegion,
)
from imstep.linalg import AbsoluteEigenvalues, IndefiniteRule
from imstep.methods_kronecker import ekfac, kfac, kl_shampoo, natural_gradient, shampoo, soap
from imstep.optim.diagonal_newton import DiagonalNewton
from imstep.optim.diagonal_rules import AdaHessianRule, DiagonalRule, SophiaG
from imstep.optim.forcing import ResidualForcing
from imstep.optim.globalized import CubicRegularization, PreconditionedGradient, SaddleFree
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import (
    BFGS,
    LimitedMemoryBFGS,
    NoPreconditioning,
    Nystrom,
    Preconditioning,
    SelfScaledBroyden,
    SquaredGradients,
)
from imstep.optim.solving import ConjugateGradient, Direct, GeneralizedLanczos, MinimalResidual
from imstep.optim.third_order import ChebyshevHalley

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "adahessian",
    "bfgs",
    "chebyshev",
    "cubic_regularization",
    "ekfac",
    "gauss_newton",
    "halley",
    "hessian_free",
    "kfac",
    "kl_shampoo",
    "lbfgs",
    "levenberg_marquardt",
    "natural_gradient",
    "newton",
    "newton_cg",
    "newton_mr",
    "nystrom_newton_cg",
    "saddle_free_newton",
    "self_scaled_broyden",
    "shampoo",
    "soap",
    "sophia",
    "trust_region",
]


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
    return _exact(params, {"solver": solver, "step": Armijo()}, options)


def newton_cg(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Truncated Newton: conjugate gradients on the Hessian until the residual is small, then a backtracking search.

        ‖H d + g‖ <= min(1/2, ‖g‖^(1/2)) ‖g‖, or until pᵀHp <= 0

    Cost: a product an iteration.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 7.1; Nash, J. Comput. Appl. Math. 124
        (2000). ‖g‖ counts relative to the largest met, so that no unit matters.
    """
    return _exact(params, {"solver": ConjugateGradient(), "step": Armijo()}, options)


def newton_mr(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Newton-MR: minimal residuals on the Hessian until the residual is small or curvature is not positive.

    Cost: a product an iteration.

    Source: Liu and Roosta, SIAM J. Optim. 32 (2022), arXiv 2206.05732.
    """
    return _exact(params, {"solver": MinimalResidual(), "step": Armijo()}, options)


def trust_region(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """A trust region on the Hessian: the model's minimiser within a radius that follows its success.

    Args:
        params: parameters or parameter groups.
        **options: ``solver`` is the subproblem's: ``GeneralizedLanczos()`` by default, ``SteihaugToint()``,
            ``Dogleg()``, ``TwoDimensionalSubspace()``, or ``Direct()`` for Moré and Sorensen's exact one.

    Cost: a product an iteration.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 4.1; Gould et al., SIAM J. Optim. 9 (1999).
    """
    return _exact(params, {"solver": GeneralizedLanczos(), "step": TrustRegion()}, options)


def cubic_regularization(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Adaptive cubic regularisation, ARC: the minimiser of the model and σ‖d‖³/3 over a Krylov space.

    Cost: a product an iteration; up to 32 parameters the subproblem is solved exactly.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295.
    """
    return _exact(params, {"solver": CubicRegularization(), "step": AdaptiveCubic()}, options)


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
    return _exact(params, method, options)


def gauss_newton(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Gauss-Newton by conjugate gradients with a backtracking search; the Hessian where the loss has no convex end.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738; Nocedal and Wright, section 10.3.
    """
    return _convex(params, {"step": Armijo()}, options)


def levenberg_marquardt(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Gauss-Newton damped by λI, with λ raised after bad steps and lowered after good ones; no search along a line.

    For sums of squares with few parameters or few residuals :class:`imstep.LeastSquares` is the faster one.

    Source: Marquardt, J. SIAM 11 (1963), 431-441.
    """
    method: NewtonKrylovOptions = {
        "damping": LevenbergMarquardt(),
        "step": TrustRegion(),
        "forcing": ResidualForcing(eta=1e-8),
    }
    return _convex(params, method, options)


def hessian_free(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Martens' Hessian-free optimisation: Gauss-Newton, warm-started conjugate gradients, λ by 3/2 and 2/3.

    Conjugate gradients are preconditioned by squared gradients to the power 3/4, and end where progress stalls.

    Source: Martens, ICML 2010, section 4; backtracking along the last solution only, not over stored iterates.
    """
    method: NewtonKrylovOptions = {
        "solver": ConjugateGradient(warm_start=0.95),
        "forcing": ResidualForcing(eta=1e-6),
        "damping": LevenbergMarquardt(factor=1.5),
        "preconditioning": SquaredGradients(power=0.75),
        "step": Armijo(),
    }
    return _convex(params, method, options)


def nystrom_newton_cg(
    params: Iterable[Any], rank: int = 60, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
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
    return _exact(params, method, options)


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
    return _exact(params, {"solver": solver, "forcing": ResidualForcing(power=2.0), "step": Armijo()}, options)


def chebyshev(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Chebyshev's method: as :func:`halley` with α = 0, so that a step takes one third derivative."""
    return halley(params, 0.0, **options)


def adahessian(
    params: Iterable[Any], rule: AdaHessianRule | None = None, lr: float | Tensor = 0.15, seed: int = 0, **options: Any
) -> DiagonalNewton:
    """AdaHessian: Adam with the Hessian's diagonal, by random signs, in the place of squared gradients.

    Args:
        params: parameters or parameter groups.
        rule: its numbers.
        lr: a fixed rate, or one that a scheduler sets.
        seed: of the signs.
        **options: of :class:`~imstep.optim.DiagonalNewton`.

    Cost: a gradient's record and a Hessian product a step.

    Source: Yao et al., AAAI 2021, arXiv 2006.00719.
    """
    return DiagonalNewton(params, rule or AdaHessianRule(), lr=lr, seed=seed, **options)


def sophia(
    params: Iterable[Any], rule: DiagonalRule | None = None, lr: float | Tensor = 1e-3, seed: int = 0, **options: Any
) -> DiagonalNewton:
    """Sophia: momentum over the Gauss-Newton matrix' diagonal, every entry clipped.

    Args:
        params: parameters or parameter groups.
        rule: ``SophiaG()``, the default, or ``SophiaH()`` for the Hessian's diagonal.
        lr: a fixed rate, or one that a scheduler sets; the default is our choice.
        seed: of sampled targets or probes.
        **options: of :class:`~imstep.optim.DiagonalNewton`.

    Cost: a gradient a step; every tenth step a backward pass more.

    Source: Liu et al., ICLR 2024, arXiv 2305.14342.
    """
    return DiagonalNewton(params, rule or SophiaG(), lr=lr, seed=seed, **options)


def _quasi_newton(
    params: Iterable[Any], preconditioning: Preconditioning, options: NewtonKrylovOptions
) -> NewtonKrylov:
    """Steps of an approximate inverse Hessian alone."""
    method: NewtonKrylovOptions = {
        "solver": PreconditionedGradient(products=False),
        "preconditioning": preconditioning,
        "step": StrongWolfe(),
    }
    return _exact(params, method, options)


def _exact(params: Iterable[Any], method: NewtonKrylovOptions, options: NewtonKrylovOptions) -> NewtonKrylov:
    """On the Hessian, undamped and without a preconditioner unless the method or the user says otherwise."""
    configuration: NewtonKrylovOptions = {
        "curvature": ExactHessian(),
        "forcing": ResidualForcing(),
        "damping": NoDamping(),
        "preconditioning": NoPreconditioning(),
    }
    configuration.update(method)
    configuration.update(options)
    return NewtonKrylov(params, **configuration)


def _convex(params: Iterable[Any], method: NewtonKrylovOptions, options: NewtonKrylovOptions) -> NewtonKrylov:
    """The same on Gauss-Newton."""
    return _exact(params, {"curvature": GaussNewtonFirst(close=0.0), **method}, options)
