"""What a step of a second-order method tells about itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from imstep.linalg import KrylovStatus

GRADIENT_COST = 1.0
LINEARISATION_COST = 4 / 3
HESSIAN_PRODUCT_COST = 2.0
GAUSS_NEWTON_PRODUCT_COST = 4 / 3
LOSS_COST = 1 / 3
BACKWARD_COST = 2 / 3
THIRD_DERIVATIVE_COST = 25 / 3


class StepOutcome(Enum):
    """What became of a step; a member's value is its message, its lower-case name the word for files."""

    ACCEPTED = "the parameters moved"
    REJECTED = "no trial along the direction was acceptable; parameters and buffers are as before"
    NON_FINITE = "the loss or its gradient was not finite; parameters and buffers are as before"
    CONVERGED = "the gradient norm is within the tolerance and no direction of negative curvature was found"

    @property
    def message(self) -> str:
        """A clause that explains the outcome to a reader."""
        return self.value

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Cost:
    """What a step spent, counted in evaluations.

    Attributes:
        gradients: plain forward and backward passes.
        linearisations: forward and backward passes that also record the derivative of the gradient.
        hessian_products, gauss_newton_products: products, replayed from the record.
        losses: forward passes of trial steps.
        refreshes: backward passes that refresh a preconditioner.
        third_derivatives: evaluations on nested numbers.
        jacobian_passes: backward passes for the rows of a Jacobian.
        variances: backward passes that measure the gradient's variance.
    """

    gradients: int = 0
    linearisations: int = 0
    hessian_products: int = 0
    gauss_newton_products: int = 0
    losses: int = 0
    refreshes: int = 0
    third_derivatives: int = 0
    jacobian_passes: int = 0
    variances: int = 0

    def __add__(self, other: Cost) -> Cost:
        # vars, since asdict copies deeply: a step adds costs a dozen times
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def products(self) -> int:
        """Products with a curvature matrix, of either kind."""
        return self.hessian_products + self.gauss_newton_products

    @property
    def gradient_equivalents(self) -> float:
        """The cost in gradients: 1, 4/3, 2, 4/3, 1/3, 2/3, 25/3, 2/3 and 2/3 for the nine kinds.

        Counted in matrix products a layer, of which a gradient makes 3, a Hessian product 6, a Gauss-Newton product 4,
        a loss 1, a backward pass 2 and a third derivative 25; recording was measured at 1.2 gradients on a deep
        autoencoder and is charged 4/3. The linear algebra on vectors and Kronecker factors is not counted; it shows in
        seconds.
        """
        return (
            GRADIENT_COST * self.gradients
            + LINEARISATION_COST * self.linearisations
            + HESSIAN_PRODUCT_COST * self.hessian_products
            + GAUSS_NEWTON_PRODUCT_COST * self.gauss_newton_products
            + LOSS_COST * self.losses
            + BACKWARD_COST * (self.refreshes + self.jacobian_passes + self.variances)
            + THIRD_DERIVATIVE_COST * self.third_derivatives
        )


@dataclass(frozen=True)
class StepRecord:
    """One step, as it happened. Numbers that a step did not come to are nan.

    Where a learning rate is not 1, ``step_length`` to ``taylor_error`` are of the step that was found, before it;
    ``new_loss`` and ``step_norm`` of what was taken.

    Attributes:
        step: how many steps were taken before this one.
        outcome: what became of the step.
        status: why the Krylov iteration ended, which is not what became of the step; None if there was none.
        loss, new_loss: f before and after the step, weight decay included; equal unless it was accepted.
        penalty, new_penalty: the part of them that is weight decay; the rest is the closure's loss.
        check_loss, new_check_loss: the loss at other points before and after the step, of a ``check``; nan without one.
        gradient_norm: ‖g‖ before the step, weight decay included.
        gradient_variance: the trace of the covariance of g as a mean over examples, estimated from two halves; of the
            part that the curvature was taken from, if there was one. nan where it was not asked for.
        iterations: Krylov iterations, that is, directions the solution was built from.
        products: products with the curvature matrix.
        trials: trial points evaluated.
        step_length: t of the last trial.
        direction_norm: ‖d‖.
        step_norm: how far the parameters moved: t‖d‖, of which learning rates leave a part.
        slope, curvature: s = gᵀd and k = dᵀAd, A being the curvature matrix of the step, undamped.
        predicted_decrease: q(t) = -t s - t²k/2.
        actual_decrease: f(w) - f(w + t d).
        rho: actual over predicted decrease.
        taylor_error: E(t) = f(w + t d) - (f + t s + t²k/2), with its sign.
        radius, damping: the trust radius and λ that this step used.
        went_back: whether the step before was taken back, for loss or gradient were not finite where it ended; this one
            began where that had begun.
        factorisation: of a Jacobian: "columns" or all ("dense") of J Jᵀ, "rows" of J, its "singular values" or
            "triangular" factor, a "sketch", or of a "box"; None if there was none. See docs/residual-space.md.
        rank: how many numbers the step was sought among.
        weights: of the terms of the loss, where they are balanced. ``slope`` to ``taylor_error`` are then of the loss
            with these weights, by which the step is judged; all other losses, and ``gradient_norm``, are without.
        weighted_loss, new_weighted_loss: the former before and after the step, weight decay included.
        quasi_newton: whether it was a step of :class:`QuasiNewtonSteps`, by a model that is learnt; ``status`` is None.
        static: whether the evaluation that curvature is taken from had the structure of an earlier one, so that its
            backward pass was run as a list of operators; the numbers are the same. See docs/complex-step.md.
        cost: evaluations spent.
        seconds: wall-clock time.
    """

    step: int
    outcome: StepOutcome
    status: KrylovStatus | None
    loss: float
    new_loss: float
    gradient_norm: float
    penalty: float = 0.0
    new_penalty: float = 0.0
    gradient_variance: float = math.nan
    iterations: int = 0
    products: int = 0
    trials: int = 0
    step_length: float = math.nan
    direction_norm: float = math.nan
    step_norm: float = 0.0
    slope: float = math.nan
    curvature: float = math.nan
    predicted_decrease: float = math.nan
    actual_decrease: float = math.nan
    rho: float = math.nan
    taylor_error: float = math.nan
    radius: float = math.nan
    damping: float = math.nan
    went_back: bool = False
    factorisation: str | None = None
    rank: int = 0
    weights: tuple[float, ...] = ()
    weighted_loss: float = math.nan
    new_weighted_loss: float = math.nan
    check_loss: float = math.nan
    new_check_loss: float = math.nan
    quasi_newton: bool = False
    static: bool = field(default=False, compare=False)
    cost: Cost = Cost()
    seconds: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite before the step."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def accepted(self) -> bool:
        """Whether the parameters moved."""
        return self.outcome is StepOutcome.ACCEPTED

    @property
    def generalisation(self) -> float:
        """How much of the step's relative decrease of the loss is found at other points, log C'/C over log f'/f.

        1 where the loss there falls by the same factor, 0 where it stays, less where it rises; nan where it is not
        known, or the loss does not fall. Losses are those of closures, without weight decay.
        """
        losses = self.loss - self.penalty, self.new_loss - self.new_penalty, self.check_loss, self.new_check_loss
        if not all(0 < value < math.inf for value in losses) or not losses[1] < losses[0]:
            return math.nan
        return math.log(losses[2] / losses[3]) / math.log(losses[0] / losses[1])

    def to_dict(self) -> dict[str, Any]:
        """A flat dictionary for JSON: enums as lower-case words, the cost's counts and its gradient-equivalents.

        Without ``static``, which a run that is resumed says otherwise of its first steps.
        """
        row = {k: v for k, v in self.__dict__.items() if k not in ("cost", "static")}
        row["outcome"] = str(self.outcome)
        row["status"] = None if self.status is None else str(self.status)
        row.update(asdict(self.cost), products=self.cost.products)
        row["gradient_equivalents"] = self.cost.gradient_equivalents
        return row
