"""Steps on the Gauss-Newton matrix, which is the Fisher matrix of a likelihood in natural parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from imstep.curvature.choice import FisherCurvature
from imstep.curvature.fisher import Empirical, Exact, Expectation, MonteCarlo
from imstep.globalization import Armijo, LevenbergMarquardt, TrustRegion
from imstep.methods.configured import on_gauss_newton
from imstep.optim.backtracking import IterateBacktracking
from imstep.optim.forcing import ResidualForcing
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import SquaredGradients
from imstep.optim.solving import ConjugateGradient

if TYPE_CHECKING:
    from typing_extensions import Unpack


_FISHERS: dict[str, Callable[[int], Expectation]] = {
    "exact": lambda seed: Exact(),
    "monte-carlo": lambda seed: MonteCarlo(seed=seed),
    "empirical": lambda seed: Empirical(),
}


def gauss_newton(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Gauss-Newton by conjugate gradients with a backtracking search; the Hessian where the loss has no convex end.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738; Nocedal and Wright, section 10.3.
    """
    return on_gauss_newton(params, {"step": Armijo()}, options)


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
    return on_gauss_newton(params, method, options)


def hessian_free(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Martens' Hessian-free optimisation: Gauss-Newton, warm-started conjugate gradients, λ by 3/2 and 2/3.

    Conjugate gradients are preconditioned by squared gradients to the power 3/4, and end where progress stalls. The
    direction is the best of their stored iterates by the loss.

    For recurrent networks see :class:`~imstep.curvature.StructuralDamping`.

    Source: Martens, ICML 2010, section 4.
    """
    method: NewtonKrylovOptions = {
        "solver": ConjugateGradient(warm_start=0.95, backtracking=IterateBacktracking()),
        "forcing": ResidualForcing(eta=1e-6),
        "damping": LevenbergMarquardt(factor=1.5),
        "preconditioning": SquaredGradients(power=0.75),
        "step": Armijo(),
    }
    return on_gauss_newton(params, method, options)


def natural_gradient(
    params: Iterable[Any],
    fisher: str | Expectation = "exact",
    seed: int = 0,
    **options: Unpack[NewtonKrylovOptions],
) -> NewtonKrylov:
    """Natural gradient descent: -(F + λI)⁻¹ g with the Fisher matrix F of the loss, by conjugate gradients.

    The loss must be a likelihood: squared errors, cross entropies and the like; see
    :class:`~imstep.optim.FisherCurvature`. The exact F is then the Gauss-Newton matrix. With ``momentum=True`` the
    direction is the minimiser of the quadratic model over it and the last step, as in K-FAC.

    Args:
        params: parameters or parameter groups.
        fisher: "exact", "monte-carlo" for targets drawn anew in each step, "empirical" for those observed; or an
            expectation, such as ``MonteCarlo(samples=4)``.
        seed: of drawn targets.

    Raises:
        ValueError: another word; in a step: the loss is not recognised as a likelihood.

    Cost: a product an iteration.

    Source: Amari, Neural Computation 10 (1998), 251-276; Martens, JMLR 21 (2020), number 146; the empirical matrix is
        not the Fisher matrix away from a good fit: Kunstner, Balles and Hennig, NeurIPS 2019 (arXiv 1905.12558).
    """
    if isinstance(fisher, str):
        if fisher not in _FISHERS:
            raise ValueError(f"fisher is one of {', '.join(map(repr, _FISHERS))}, or an Expectation; got {fisher!r}.")
        fisher = _FISHERS[fisher](seed)
    method: NewtonKrylovOptions = {
        "curvature": FisherCurvature(fisher),
        "forcing": ResidualForcing(),
        "damping": LevenbergMarquardt(),
        "step": Armijo(),
    }
    return on_gauss_newton(params, method, options)
