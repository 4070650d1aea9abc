"""Natural gradients and their Kronecker-factored relatives, by name; see :mod:`imstep.methods`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.curvature.choice import FisherCurvature, GaussNewtonFirst
from imstep.curvature.fisher import Empirical, Exact, Expectation, MonteCarlo
from imstep.globalization import Armijo, FixedStep, LevenbergMarquardt
from imstep.optim.forcing import FixedProducts, ResidualForcing
from imstep.optim.globalized import PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioned_momentum import PreconditionedMomentum
from imstep.optim.preconditioning import (
    SOAP,
    KLShampoo,
    Kronecker,
    KroneckerEigenbasis,
    NoPreconditioning,
    Preconditioning,
    Shampoo,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FISHERS: dict[str, Callable[[int], Expectation]] = {
    "exact": lambda seed: Exact(),
    "monte-carlo": lambda seed: MonteCarlo(seed=seed),
    "empirical": lambda seed: Empirical(),
}


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
    configuration: NewtonKrylovOptions = {
        "curvature": FisherCurvature(fisher),
        "forcing": ResidualForcing(),
        "damping": LevenbergMarquardt(),
        "preconditioning": NoPreconditioning(),
        "step": Armijo(),
    }
    configuration.update(options)
    return NewtonKrylov(params, **configuration)


def kfac(params: Iterable[Any], seed: int = 0, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """K-FAC: Kronecker factors alone give the direction; the exact model gives its length and the momentum.

        [α, β] = argmin over α d + β e of the damped model,   d = -P g,   e the last step

    The damping is shared by the factors; ``preconditioning=Kronecker(damping=TikhonovDamping())`` adds it to their
    product instead.

    Args:
        params: parameters or parameter groups.
        seed: of the factors' sampled targets.

    Cost: two products a step.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), sections 6.4 and 7; factors of Gauss-Newton.
    """
    return _factored(params, Kronecker(seed=seed), options)


def ekfac(params: Iterable[Any], seed: int = 0, **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """E-KFAC: as :func:`kfac`, with second moments of gradients in the factors' eigenvectors; Tikhonov's damping.

        d = -G ((Gᵀ∇A) / (s + λ)) Aᵀ,   s = Σ E[(Gᵀ D A)²] over gradients D of single cases with sampled targets

    Args:
        params: parameters or parameter groups.
        seed: of the sampled targets.

    Cost: two products a step.

    Source: George et al., NeurIPS 2018 (arXiv 1806.03884), Algorithm 1; length and momentum as in K-FAC, in place of a
        learning rate.
    """
    return _factored(params, KroneckerEigenbasis(seed=seed), options)


def shampoo(
    params: Iterable[Any], lr: float | Tensor = 0.3, rule: Shampoo | None = None, **options: Any
) -> PreconditionedMomentum:
    """Shampoo, first-order: momentum times the inverse roots of sums of the gradients' row and column products.

        w <- w - lr L^(-1/4) m R^(-1/4),   L = Σ G Gᵀ,   R = Σ Gᵀ G

    Args:
        params: parameters or parameter groups.
        lr: a fixed rate, or one that a scheduler sets; sums let steps shorten by themselves. The default is our choice,
            by trial on a small classifier.
        rule: its numbers.
        **options: of :class:`~imstep.optim.PreconditionedMomentum`.

    Cost: a gradient a step, and multiplications with the roots.

    Source: Gupta, Koren and Singer, ICML 2018 (arXiv 1802.09568).
    """
    return PreconditionedMomentum(params, rule or Shampoo(sums=True), lr=lr, **options)


def soap(
    params: Iterable[Any], lr: float | Tensor = 1e-2, rule: SOAP | None = None, **options: Any
) -> PreconditionedMomentum:
    """SOAP, first-order: Adam in the eigenvectors of Shampoo's matrices.

    Args:
        params: parameters or parameter groups.
        lr: a fixed rate, or one that a scheduler sets; the default is our choice, as of :func:`shampoo`.
        rule: its numbers.
        **options: of :class:`~imstep.optim.PreconditionedMomentum`.

    Cost: a gradient a step, and multiplications with the eigenvectors.

    Source: Vyas et al., ICLR 2025 (arXiv 2409.11321), and its numbers, but for the rate: 3e-3 there, for language
        models.
    """
    return PreconditionedMomentum(params, rule or SOAP(), lr=lr, **{"momentum": 0.95, **options})


def kl_shampoo(
    params: Iterable[Any], lr: float | Tensor = 1e-2, rule: KLShampoo | None = None, **options: Any
) -> PreconditionedMomentum:
    """KL-Shampoo, first-order: momentum whitened by the covariance S_a ⊗ S_b nearest to that of the gradients.

    Args:
        params: parameters or parameter groups.
        lr: a fixed rate, or one that a scheduler sets; as of :func:`soap`: entries of a step are of size lr.
        rule: its numbers.
        **options: of :class:`~imstep.optim.PreconditionedMomentum`.

    Cost: a gradient a step, and multiplications with the roots; two more for the moments.

    Source: Lin et al., arXiv 2509.03378.
    """
    return PreconditionedMomentum(params, rule or KLShampoo(), lr=lr, **{"momentum": 0.95, **options})


def _factored(params: Iterable[Any], factors: Preconditioning, options: NewtonKrylovOptions) -> NewtonKrylov:
    """Steps of factors alone, rescaled by the exact model."""
    configuration: NewtonKrylovOptions = {
        "curvature": GaussNewtonFirst(close=0.0),
        "solver": PreconditionedGradient(),
        "forcing": FixedProducts(1),
        "damping": LevenbergMarquardt(initial=1.0, factor=1.2),
        "preconditioning": factors,
        "step": FixedStep(),
        "momentum": True,
    }
    configuration.update(options)
    return NewtonKrylov(params, **configuration)
