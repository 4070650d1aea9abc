"""Updates of an approximate inverse Hessian by a step s and the change y = A s of the gradient along it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imstep.linalg.dots import dots

_LEAST_DENOMINATOR = 1e-8
"""Of a symmetric rank-one update, as a cosine; Nocedal and Wright, Numerical Optimization (2nd ed.), (6.26)."""


def bfgs_update(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The BFGS update, the symmetric matrix next to H that maps y to s.

        H <- (I - s yᵀ/c) H (I - y sᵀ/c) + s sᵀ/c,   c = yᵀs

    Args:
        inverse: H, (n, n), symmetric positive definite.
        step: s, (n,).
        change: y, (n,).

    Returns:
        The new H, positive definite; the old one where c is not safely positive.

    Cost: a product with H and two outer products.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), (6.17).

    Example:
        >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])
        >>> bfgs_update(torch.eye(2), s, y)
        tensor([[0.2500, 0.0000],
                [0.0000, 1.0000]])
    """
    image = inverse @ change
    along, across = dots((change, step), (change, image))
    if not curved(step, change):
        return inverse
    cross = torch.outer(step, image / along)
    return inverse - cross - cross.mT + torch.outer(step, (1 + across / along) / along * step)


def sr1_update(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The symmetric rank-one update; it may make H indefinite, as the Hessian may be.

        H <- H + v vᵀ / vᵀy,   v = s - H y

    Args, Returns: see :func:`bfgs_update`; the old H where |vᵀy| is below 1e-8 ‖v‖‖y‖.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), (6.25) and (6.26).

    Example:
        >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])
        >>> sr1_update(torch.eye(2), s, y)
        tensor([[-0.5000,  0.0000],
                [ 0.0000,  1.0000]])
    """
    rest = step - inverse @ change
    along, rest2, change2 = dots((rest, change), (rest, rest), (change, change))
    if not (math.isfinite(along) and abs(along) > _LEAST_DENOMINATOR * math.sqrt(rest2 * change2)):
        return inverse
    return inverse + torch.outer(rest, rest / along)


def self_scaled_update(
    inverse: Tensor, step: Tensor, change: Tensor, image: Tensor, theta: float | None = None
) -> Tensor:
    """An update of Broyden's family, of a matrix that is first scaled.

        H <- (H - H y yᵀH / yᵀHy + φ v vᵀ) / τ + s sᵀ/yᵀs,   v = (yᵀHy)^(1/2) (s / yᵀs - H y / yᵀHy)

    With b = sᵀH⁻¹s / yᵀs, h = yᵀHy / yᵀs, a = b h - 1, r = min(1, h (1 - (a/(1 + a))^(1/2))):

        θ = max((r - 1)/a, min(1/r, (1 - b)/b)),   φ = (1 - θ)/(1 + a θ),   σ = 1 + a θ
        τ = min(1, 1/b) min(σ^(-1/(n - 1)), 1/θ)   for θ > 0,   min(min(1, 1/b) σ^(-1/(n - 1)), σ)   else

    Args:
        inverse, step, change: see :func:`bfgs_update`.
        image: H⁻¹ s, (n,).
        theta: θ; 0 for the self-scaled BFGS update, None for the value above.

    Returns:
        The new H; the old one where yᵀs is not safely positive; yᵀs / yᵀy times the identity where rounding has made
        yᵀHy or sᵀH⁻¹s negative.

    Cost: a product with H and two outer products.

    Source: Urbán, Stefanou and Pons, J. Comput. Phys. 523 (2025), arXiv 2405.04230, and Kiyani et al., arXiv
        2501.16371, after Al-Baali, Comput. Optim. Appl. 9 (1998), for θ and τ; Oren and Luenberger, Management Science
        20 (1974), for 1/b.

    Example:
        >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.0])
        >>> self_scaled_update(torch.eye(2), s, y, s, theta=0.0)
        tensor([[4., 0.],
                [0., 4.]])
    """
    if not curved(step, change):
        return inverse
    other = inverse @ change
    along, across, size = dots((change, step), (change, other), (step, image))
    if not (across > 0 and size > 0):  # rounding has made H indefinite
        return (along / float(change @ change)) * torch.eye(len(step), dtype=step.dtype, device=step.device)
    b, h = size / along, across / along
    a = max(b * h - 1, 0.0)  # negative by rounding only
    if theta is None:
        theta = _theta(a, b, h)
    sigma = 1 + a * theta
    tau, spread = min(1.0, 1 / b), sigma ** (-1 / max(len(step) - 1, 1))
    tau = tau * min(spread, 1 / theta) if theta > 0 else min(tau * spread, sigma)
    v = math.sqrt(across) * (step / along - other / across)
    inner = inverse - torch.outer(other, other / across) + torch.outer(v, (1 - theta) / sigma * v)
    return inner / tau + torch.outer(step, step / along)


def _theta(a: float, b: float, h: float) -> float:
    least = min(1.0, h / ((1 + a) * (1 + math.sqrt(a / (1 + a)))))  # as above, without cancellation
    lowest = (least - 1) / a if a > 0 else (0.0 if least == 1 else -math.inf)
    return max(lowest, min(1 / least, (1 - b) / b))


def curved(step: Tensor, change: Tensor) -> bool:
    """Whether yᵀs is positive beyond rounding."""
    along, step2, change2 = dots((step, change), (step, step), (change, change))
    return math.isfinite(along) and along > torch.finfo(step.dtype).eps * math.sqrt(step2 * change2)
