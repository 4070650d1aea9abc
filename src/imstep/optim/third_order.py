"""Steps of third order: Chebyshev's, Halley's and super-Halley's, from exact third derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from imstep.linalg import LinearOperator, conjugate_gradient
from imstep.optim.direction import Direction
from imstep.optim.record import Cost
from imstep.optim.solving import ConjugateGradient, NewtonSystem, Solver


@dataclass(frozen=True)
class ChebyshevHalley(Solver):
    """Newton's step, corrected by what the third derivative T says of it.

        d = d₁ - (A + λI + α T[d₁])⁻¹ T[d₁, d₁] / 2,   (A + λI) d₁ = -g

    Both systems are solved by conjugate gradients. Convergence is of order three where A is the Hessian and they are
    solved as accurately: ``curvature=ExactHessian()`` and ``forcing=ResidualForcing(power=2)``. Where one of them meets
    negative curvature, or the correction is longer than d₁ or leads uphill, the step is d₁.

    Args:
        alpha: α: 0 for Chebyshev's step, 1/2 for Halley's, 1 for super-Halley's. In [0, 1].

    Cost: beside the products one third derivative, 25/3 gradients; with α > 0 one more for each iteration of the second
        system.

    Source: Gutiérrez and Hernández, Bull. Austral. Math. Soc. 55 (1997), 113-130, for the family; Gundersen and
        Steihaug, Optim. Methods Softw. 25 (2010), 331-342, for optimisation.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha, the share of the third derivative in the matrix, is in [0, 1], got {self.alpha}.")

    def solve(self, system: NewtonSystem) -> Direction:
        newton = ConjugateGradient().solve(system)
        if newton.status.disturbing:
            return newton
        assert system.third_derivative is not None
        bent = _Bent(system.operator, system.third_derivative, newton.vector, self.alpha)
        result = conjugate_gradient(
            bent,
            bent.bend(newton.vector) / -2,
            damping=system.damping,
            preconditioner=system.preconditioner,
            stopping=system.stopping,
        )
        newton = replace(newton, iterations=newton.iterations + result.iterations)
        newton = replace(newton, cost=Cost(third_derivatives=bent.derivatives))
        if result.status.disturbing or not float(result.solution.norm()) <= newton.norm:
            return newton
        # With T in the matrix of the second system, A alone takes a product more.
        image = system.operator @ result.solution if self.alpha else result.image
        both = newton.moved(newton.vector + result.solution, newton.image + image, system.gradient)
        return both if both.descends(system.gradient) else newton


class _Bent(LinearOperator):
    """A + α T[d]; counts the third derivatives it takes."""

    def __init__(
        self, operator: LinearOperator, third: Callable[[Tensor, Tensor], Tensor], along: Tensor, alpha: float
    ) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self._operator, self._third, self._along, self._alpha = operator, third, along, alpha
        self.derivatives = 0

    def bend(self, vector: Tensor) -> Tensor:
        """T[d, v]."""
        self.derivatives += 1
        return self._third(self._along, vector)

    def matvec(self, vector: Tensor) -> Tensor:
        product = self._operator.matvec(vector)
        return product.add(self.bend(vector), alpha=self._alpha) if self._alpha else product
