"""When a Krylov iteration has done enough: exchangeable rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from imstep.linalg.result import KrylovStatus


@dataclass(frozen=True)
class Progress:
    """What a stopping rule sees after an iteration.

    Attributes:
        products: products with the operator spent so far.
        residual_norm: ‖r_j‖ of the current iterate.
        rhs_norm: ‖b‖ (for a start at zero the norm of the first residual).
        decreases: the model decreases q_0, ..., q_j of all iterates; q_0 = 0 for a start at zero. Read only.
    """

    products: int
    residual_norm: float
    rhs_norm: float
    decreases: Sequence[float]

    @property
    def iteration(self) -> int:
        """The number j of iterations done."""
        return len(self.decreases) - 1


class StoppingRule(ABC):
    """A rule that ends a Krylov iteration; the solver asks its rules in order, the first answer counts."""

    @abstractmethod
    def check(self, progress: Progress) -> KrylovStatus | None:
        """The status to end with, or None to go on."""


def first_answer(
    rules: Sequence[StoppingRule], progress: Progress, limit: float = math.inf
) -> KrylovStatus | None:
    """The status that the first rule to answer gives, or that of a limit on iterations; None if all would go on."""
    answers = (rule.check(progress) for rule in rules)
    reached = KrylovStatus.MAX_ITERATIONS if progress.iteration >= limit else None
    return next((answer for answer in answers if answer is not None), reached)


@dataclass(frozen=True)
class RelativeResidual(StoppingRule):
    """Converged as soon as ‖r_j‖ <= eta ‖b‖.

    Args:
        eta: in [0, 1); a Newton method passes its forcing term.

    Raises:
        ValueError: eta is out of range.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), section 7.1, inexact Newton methods.

    Example:
        >>> progress = Progress(1, residual_norm=0.05, rhs_norm=1.0, decreases=[0.0, 1.0])
        >>> RelativeResidual(0.1).check(progress).name
        'CONVERGED'
    """

    eta: float

    def __post_init__(self) -> None:
        if not 0 <= self.eta < 1:
            raise ValueError(f"eta, the relative residual, must lie in [0, 1), got {self.eta}.")

    def check(self, progress: Progress) -> KrylovStatus | None:
        if progress.residual_norm <= self.eta * progress.rhs_norm:
            return KrylovStatus.CONVERGED
        return None


@dataclass(frozen=True)
class ProgressStall(StoppingRule):
    """Enough as soon as the model gains less than `tolerance` of itself per iteration.

    (q_j - q_{j-k}) / q_j < k tolerance with k = max(minimum, j/10), asked once j > k.

    Args:
        tolerance: relative gain per iteration, > 0.
        minimum: shortest window in iterations, >= 1.

    Raises:
        ValueError: an argument is out of range.

    Source: Martens, Deep learning via Hessian-free optimization (2010), section 4.4; the defaults are his.

    Example:
        >>> flat = Progress(12, residual_norm=0.5, rhs_norm=1.0, decreases=[0.0] + [1.0] * 12)
        >>> ProgressStall().check(flat).name
        'ENOUGH'
    """

    tolerance: float = 5e-4
    minimum: int = 10

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and self.minimum >= 1):
            raise ValueError(
                f"tolerance must be positive and minimum at least 1, got {self.tolerance} and {self.minimum}."
            )

    def check(self, progress: Progress) -> KrylovStatus | None:
        decreases, j = progress.decreases, progress.iteration
        window = max(self.minimum, j // 10)
        if j <= window or decreases[j] <= 0:
            return None
        gain = decreases[j] - decreases[j - window]
        return KrylovStatus.ENOUGH if gain < window * self.tolerance * decreases[j] else None


@dataclass(frozen=True)
class BestRate(StoppingRule):
    """Enough as soon as further products earn less per unit cost than the step has earned so far.

    (q_j - q_{j-w}) / (w c) < patience · q_j / (fixed_cost + j c), with w = window and c = product_cost.

    It maximises model decrease per unit cost over the whole step: few products while a fresh gradient is
    worth more, many near a solution, without a setting to tune.

    Args:
        window: iterations over which the present rate is averaged, >= 1.
        product_cost: cost of a product in gradients, > 0; 2 is the arithmetic count for an exact Hessian.
        fixed_cost: what a step costs besides products, in gradients, > 0: by default a gradient (1) and a
            trial loss (1/3).
        patience: fraction of the rate so far that is still worth a product, in (0, 1]; less than 1 where accuracy
            will pay in later steps.

    Raises:
        ValueError: an argument is out of range.

    Source: our choice; a discrete form of Charnov's marginal value theorem (1976).

    Example:
        >>> steady = Progress(4, residual_norm=0.5, rhs_norm=1.0, decreases=[0.0, 1.0, 2.0, 3.0, 4.0])
        >>> print(BestRate().check(steady))
        None
        >>> flat = Progress(4, residual_norm=0.5, rhs_norm=1.0, decreases=[0.0, 1.0, 1.1, 1.11, 1.111])
        >>> BestRate().check(flat).name
        'ENOUGH'
    """

    window: int = 3
    product_cost: float = 2.0
    fixed_cost: float = 4 / 3
    patience: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.patience <= 1:
            raise ValueError(f"patience must lie in (0, 1], got {self.patience}.")
        if not (self.window >= 1 and self.product_cost > 0 and self.fixed_cost > 0):
            raise ValueError(
                "window must be at least 1 and both costs positive, got "
                f"window={self.window}, product_cost={self.product_cost}, fixed_cost={self.fixed_cost}."
            )

    def check(self, progress: Progress) -> KrylovStatus | None:
        decreases, j = progress.decreases, progress.iteration
        if j < self.window:
            return None
        rate_now = (decreases[j] - decreases[j - self.window]) / (self.window * self.product_cost)
        rate_so_far = decreases[j] / (self.fixed_cost + j * self.product_cost)
        return KrylovStatus.ENOUGH if rate_now < self.patience * rate_so_far else None


@dataclass(frozen=True)
class ProductBudget(StoppingRule):
    """Ends with MAX_ITERATIONS once `limit` products are spent, refreshes and warm start included.

    Raises:
        ValueError: limit is less than 1.

    Example:
        >>> ProductBudget(5).check(Progress(5, residual_norm=0.5, rhs_norm=1.0, decreases=[0.0, 1.0])).name
        'MAX_ITERATIONS'
    """

    limit: int

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"a product budget is at least 1, got {self.limit}.")

    def check(self, progress: Progress) -> KrylovStatus | None:
        return KrylovStatus.MAX_ITERATIONS if progress.products >= self.limit else None
