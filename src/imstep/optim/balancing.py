"""Weights of a loss's terms, chosen so that none of them is left behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.residual_jacobian import ResidualJacobian
from imstep.curvature.squares import NoResidualsError
from imstep.optim.chord import FIXED_NUMBER, decrease_of

_LEAST = 1e-5
"""Of the mean of all terms: added to each, as in jaxpi, so that no weight is more than its inverse."""


@dataclass(frozen=True)
class Balancing(ABC):
    """Weights w_k for the terms f_k of a loss: a step lowers Σ w_k f_k in place of Σ f_k.

        w_k <- memory w_k + (1 - memory) mean of all s / s_k

    A term is what the closure squares at once, by ``square()``, ``** 2`` or a mean squared error: an equation, a kind
    of conditions. The weights take the place of factors that the closure gives to terms: s_k has those in it.

    Args:
        memory: of the last step's weights, in [0, 1).
    """

    memory: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory, the share of the last step's weights, lies in [0, 1), got {self.memory}.")

    @abstractmethod
    def sizes(self, jacobian: ResidualJacobian) -> Tensor:
        """The s_k that are to be alike, (m,), of the loss without weights."""

    def weights(self, jacobian: ResidualJacobian, last: Tensor | None) -> Tensor:
        """The w_k of a step, (m,), float64, given those of the last one, which count if there are as many.

        A term whose derivatives are zero has the weight 1.

        Raises:
            ValueError: the loss has one term.
        """
        if len(jacobian.terms) == 1:
            raise ValueError(
                "balance has nothing to balance: the loss has one term, what is squared at once. Square each equation "
                "and each kind of conditions by itself, as in equation.square().mean() + boundary.square().mean(), "
                "not what torch.cat makes of them; or leave balance out."
            )
        sizes = self.sizes(jacobian)
        moved = sizes > 0
        mean = sizes[moved].mean()
        now = torch.where(moved, mean / (sizes + _LEAST * mean), 1.0)
        return now if last is None or len(last) != len(now) else self.memory * last + (1 - self.memory) * now


@dataclass(frozen=True)
class EqualTraces(Balancing):
    """All terms are learnt at about one rate: s_k is the trace of the term's block of J Jᵀ.

        w_k ∝ 1 / ‖J_k‖²

    Cost: the diagonal of J Jᵀ.

    Source: Wang, Yu and Perdikaris, J. Comput. Phys. 449 (2022), 110768 (arXiv 2007.14527), who call J Jᵀ the neural
        tangent kernel; averaged as in jaxpi (Wang et al., arXiv 2308.08468), at every step.

    Example:
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> J = ResidualJacobian(lambda: (10 * w[0] - 1).square() + (w[1] - 1).square(), [w])
        >>> EqualTraces().weights(J, None)
        tensor([ 0.5050, 50.4745], dtype=torch.float64)
    """

    def sizes(self, jacobian: ResidualJacobian) -> Tensor:
        parts = jacobian.gram().diagonal().split(jacobian.terms)
        return torch.stack([part.sum() for part in parts])


@dataclass(frozen=True)
class EqualGradients(Balancing):
    """The gradients of all terms are of one length: s_k = ‖J_kᵀρ_k‖.

    Cost: a product with Jᵀ a term.

    Source: Wang, Teng and Perdikaris, SIAM J. Sci. Comput. 43 (2021), A3055 (arXiv 2001.04536); by norms, as in jaxpi
        (Wang et al., arXiv 2308.08468), at every step.

    Example:
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> J = ResidualJacobian(lambda: (10 * w[0] - 1).square() + (w[1] - 1).square(), [w])
        >>> EqualGradients().weights(J, None)
        tensor([0.5500, 5.4997], dtype=torch.float64)
    """

    def sizes(self, jacobian: ResidualJacobian) -> Tensor:
        parts = torch.block_diag(*jacobian.residuals.split(jacobian.terms))
        return torch.stack([(jacobian.T @ part).norm() for part in parts])


class Weighted:
    """A loss with weights, beside that without, for one step.

    Args:
        weights: of the terms, (m,).
        jacobian: where the step begins, without weights.
        evaluations: that are remembered.

    Attributes:
        jacobian: with weights.
    """

    def __init__(self, weights: Tensor, jacobian: ResidualJacobian, evaluations: int) -> None:
        self.terms = weights
        self._each = weights.repeat_interleave(torch.tensor(jacobian.terms, device=weights.device))
        self._start, self.jacobian = jacobian.residuals, jacobian.weighted(self._each)
        self._met: deque[tuple[Tensor, Tensor]] = deque(maxlen=evaluations)

    def residuals(self, step: Tensor, plain: Tensor) -> Tensor:
        """With weights, given those without at w + d, (N,), which are remembered.

        Raises:
            NoResidualsError: they are more or fewer.
        """
        if len(plain) != len(self._each):
            number = len(self._each), len(plain)
            raise NoResidualsError(FIXED_NUMBER.format(*number, "balance weights each term of them"))
        self._met.append((step, plain))
        return self._each.sqrt() * plain

    def cotangent(self, plain: Tensor) -> Tensor:
        """The u (N,) with gradient Jᵀu of the weighted loss, J being that without weights."""
        return self._each * plain

    def plain_decrease(self, step: Tensor) -> float:
        """By how much a step d that was evaluated lowers the loss without weights."""
        if not bool(step.any()):
            return 0.0
        return decrease_of(self._start, next(plain for d, plain in reversed(self._met) if torch.equal(d, step)))
