"""How accurately the Newton system is solved: the stopping rules of one Krylov iteration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from imstep.linalg import BestRate, ProductBudget, ProgressStall, RelativeResidual, StoppingRule


@dataclass(frozen=True)
class Situation:
    """What is known when a Krylov iteration starts.

    Attributes:
        relative_gradient: ‖g‖ over the largest met so far, in (0, 1].
        contraction: after two full Newton steps in a row that the model foresaw, ‖g‖ over that of the point before if
            it has halved, and at most 0.95 to the power of the number of such steps before them; else 1.
        last_products: products of the last step.
        fixed_cost, product_cost: of this step apart from products, and of a product, in gradients.
    """

    relative_gradient: float
    contraction: float
    last_products: int
    fixed_cost: float
    product_cost: float


class Forcing(ABC):
    """Chooses the stopping rules of a Krylov iteration."""

    @abstractmethod
    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        """The rules for the coming iteration, in the order they are asked."""


@dataclass(frozen=True)
class BestRateForcing(Forcing):
    """As many products as pay, and as accurate as superlinear convergence needs once that sets in.

    The iteration ends at the best rate of model decrease per cost. After a full Newton step that cut the gradient by a
    factor c it goes on until the rate has fallen to c³ of that: the error, of which the decrease is the square,
    is then cut by about c^(3/2), so that the factors feed on each other to order 3/2.

    Args:
        eta: relative residual that is always enough is min(eta, ‖g‖/‖g‖_max), eta in (0, 1).
        max_products: products per step at most, >= 1.

    Source: progress test of Martens (2010), section 4.4, far from a solution; the rest is our choice.
    """

    eta: float = 0.01
    max_products: int = 300

    def __post_init__(self) -> None:
        _check(self.eta, self.max_products)

    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        patience = max(min(situation.contraction, 1.0) ** 3, 1e-30)
        rate = BestRate(
            product_cost=situation.product_cost, fixed_cost=situation.fixed_cost, patience=patience
        )
        enough = RelativeResidual(min(self.eta, situation.relative_gradient))
        if patience == 1:
            return enough, rate, ProgressStall(), ProductBudget(self.max_products)
        # Two full steps in a row may be luck: the effort at most doubles from step to step.
        return enough, rate, ProductBudget(min(2 * situation.last_products + 10, self.max_products))


@dataclass(frozen=True)
class FixedProducts(Forcing):
    """The same number of products in every step, fewer only at a solution.

    On mini-batches: more products fit the batch rather than the data.

    Args:
        count: products per step, >= 1.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count, the products of a step, is at least 1, got {self.count}.")

    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        return RelativeResidual(1e-6), ProductBudget(self.count)


@dataclass(frozen=True)
class ResidualForcing(Forcing):
    """The classical inexact Newton method: ‖r‖ <= min(eta, (‖g‖/‖g‖_max)^power) ‖g‖ in every step.

    Args:
        eta: largest forcing term, in (0, 1).
        max_products: products per step at most, >= 1.
        power: > 0; a step of order 1 + power keeps its order. Above 1/2 an iteration whose progress stalls goes on.
    """

    eta: float = 0.5
    max_products: int = 300
    power: float = 0.5

    def __post_init__(self) -> None:
        _check(self.eta, self.max_products)
        if not 0 < self.power < math.inf:
            raise ValueError(f"power, of the relative gradient, is positive, got {self.power}.")

    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        enough, budget = min(self.eta, situation.relative_gradient**self.power), ProductBudget(self.max_products)
        if self.power > 0.5:
            return RelativeResidual(enough), budget
        return RelativeResidual(enough), ProgressStall(), budget


def _check(eta: float, max_products: int) -> None:
    if not 0 < eta < 1:
        raise ValueError(f"eta must lie in (0, 1), got {eta}.")
    if max_products < 1:
        raise ValueError(f"max_products is at least 1, got {max_products}.")
