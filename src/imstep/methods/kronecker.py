"""Steps of Kronecker factors, of a loss's curvature or of its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.globalization import FixedStep, LevenbergMarquardt
from imstep.methods.configured import on_gauss_newton
from imstep.optim.forcing import FixedProducts
from imstep.optim.globalized import PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioned_momentum import PreconditionedMomentum
from imstep.optim.preconditioning import SOAP, KLShampoo, Kronecker, KroneckerEigenbasis, Preconditioning, Shampoo

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    method: NewtonKrylovOptions = {
        "solver": PreconditionedGradient(),
        "forcing": FixedProducts(1),
        "damping": LevenbergMarquardt(initial=1.0, factor=1.2),
        "preconditioning": factors,
        "step": FixedStep(),
        "momentum": True,
    }
    return on_gauss_newton(params, method, options)
