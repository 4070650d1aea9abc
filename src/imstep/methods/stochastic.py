"""Newton's method on batches: what is the exact Hessian's method, with samples of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.globalization import AdaptiveCubic, Armijo, FixedStep, LevenbergMarquardt
from imstep.methods.configured import on_hessian
from imstep.optim.forcing import FixedProducts
from imstep.optim.globalized import CubicRegularization, PreconditionedGradient
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import AutomaticRate, Nystrom
from imstep.optim.solving import ConjugateGradient
from imstep.optim.variance_reduction import VarianceReduction

if TYPE_CHECKING:
    from typing_extensions import Unpack


def subsampled_newton(
    params: Iterable[Any], products: int = 10, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """Subsampled Newton-CG: few products on a batch, a backtracking search on the same batch.

    The gradient's variance is measured every step, for batches that grow: :class:`~imstep.optim.GrowingBatches`. With
    ``step(closure, curvature_closure)`` the Hessian is that of a smaller sample than the gradient's.

    Args:
        params: parameters or parameter groups.
        products: of a step, at most.

    Cost: the products, a recorded gradient, a backward pass for the variance and a loss for each trial.

    Source: Byrd, Chin, Neveitt and Nocedal, SIAM J. Optim. 21 (2011), 977-995; Byrd, Chin, Nocedal and Wu, Mathematical
        Programming 134 (2012), 127-155, for the batches.
    """
    method: NewtonKrylovOptions = {
        "solver": ConjugateGradient(),
        "forcing": FixedProducts(products),
        "step": Armijo(),
        "variance_every": 1,
    }
    return on_hessian(params, method, options)


def stochastic_cubic(params: Iterable[Any], **options: Unpack[NewtonKrylovOptions]) -> NewtonKrylov:
    """Sub-sampled cubic regularisation, SCR: :func:`cubic_regularization` with gradient and Hessian of a batch.

    The gradient's variance is measured every step, for batches that grow: :class:`~imstep.optim.GrowingBatches`. With
    ``variance_reduction`` it is a stochastic variance-reduced cubic method.

    Args:
        params: parameters or parameter groups.

    Source: Kohler and Lucchi, ICML 2017, Algorithm 1, whose ratio is of the full loss, here of the batch's; Zhou, Xu
        and Gu, ICML 2018, for variance-reduced gradients, whose Hessians are reduced as well.
    """
    method: NewtonKrylovOptions = {
        "solver": CubicRegularization(),
        "step": AdaptiveCubic(),
        "variance_every": 1,
    }
    return on_hessian(params, method, options)


def sketchy_sgd(
    params: Iterable[Any], rank: int = 10, every: int = 50, **options: Unpack[NewtonKrylovOptions]
) -> NewtonKrylov:
    """SketchySGD: batch gradients, preconditioned by a low-rank approximation of the Hessian, at a rate of its own.

        w <- w - η (U Λ Uᵀ + λI)⁻¹ g,   η = 1 / (2 λ_max of the preconditioned Hessian)

    With less variance: :func:`sketchy_svrg`.

    Args:
        params: parameters or parameter groups.
        rank: of the approximation.
        every: steps between two of them.

    Cost: a recorded gradient and a loss; ``rank`` + 10 products every ``every`` steps.

    Source: Frangella, Rathore, Zhao and Udell, SIAM J. Math. Data Sci. 6 (2024), arXiv 2211.08597, Algorithm 3.1;
        λ = 1e-3 as there, here relative to the curvature along the first gradient, and the
        Hessian of the batch at hand.
    """
    rho = 1e-3
    method: NewtonKrylovOptions = {
        "solver": PreconditionedGradient(products=False),
        "preconditioning": AutomaticRate(Nystrom(rank=rank, every=every)),
        "damping": LevenbergMarquardt(initial=rho, floor=rho, ceiling=rho),
        "step": FixedStep(),
    }
    return on_hessian(params, method, options)


def sketchy_svrg(
    params: Iterable[Any],
    full: Callable[[], Tensor],
    snapshot_every: int = 100,
    rank: int = 10,
    every: int = 50,
    **options: Unpack[NewtonKrylovOptions],
) -> NewtonKrylov:
    """SketchySVRG: :func:`sketchy_sgd` with gradients of batches that a snapshot and all data free of variance.

        w <- w - η (U Λ Uᵀ + λI)⁻¹ (∇f_B(w) - ∇f_B(w̃) + ∇f(w̃)),   w̃ a snapshot of w

    Args:
        params: parameters or parameter groups.
        full: returns the loss of all data, a mean as that of the batches is.
        snapshot_every: batches between two snapshots: about those of two epochs.
        rank: of the approximation.
        every: steps between two of them.

    Cost: that of :func:`sketchy_sgd`, a gradient of the batch at the snapshot, and one of all data for a new snapshot.

    Source: Frangella, Rathore, Zhao and Udell, PROMISE, J. Machine Learning Research 25 (2024), arXiv 2309.02014,
        Algorithm 1; the rate, λ and the Hessian of one batch are those of :func:`sketchy_sgd`.
    """
    options["variance_reduction"] = VarianceReduction(None, full, snapshot_every)
    return sketchy_sgd(params, rank, every, **options)
