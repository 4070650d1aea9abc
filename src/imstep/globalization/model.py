"""The quadratic model of the loss along a direction."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """What was found at w + t d.

    Attributes:
        step_length: t.
        loss: f(w + t d), finite or not.
        slope: g(w + t d)·d; None where no gradient was evaluated.
    """

    step_length: float
    loss: float
    slope: float | None = None


@dataclass(frozen=True)
class LineDerivatives:
    """Derivatives of the loss itself along d, exact.

    Attributes:
        second: dᵀHd; differs from the model's curvature where that is not of the Hessian.
        third: D³f[d, d, d].
    """

    second: float
    third: float


@dataclass(frozen=True)
class LineModel:
    """m(t) = f + t s + t² k / 2, the loss at w + t d to second order.

    Args:
        loss: f, the loss at w.
        slope: s = gᵀd; negative for a descent direction.
        curvature: k = dᵀAd, of the undamped curvature, any sign.
        norm: ‖d‖ > 0.
        unit_roundoff: u, the relative error of one loss evaluation at best: half the spacing of the loss's
            dtype, `torch.finfo(dtype).eps / 2`.
        derivatives: those beyond the slope, where a search asked for them.

    Raises:
        ValueError: a number is not finite, or the norm is not positive.

    Example:
        >>> model = LineModel(loss=1.0, slope=-2.0, curvature=4.0, norm=1.0)
        >>> model.value(0.5), model.decrease(0.5), model.minimizer
        (0.5, 0.5, 0.5)
    """

    loss: float
    slope: float
    curvature: float
    norm: float
    unit_roundoff: float = 2.0**-53
    derivatives: LineDerivatives | None = None

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.loss, self.slope, self.curvature, self.norm))) or self.norm <= 0:
            raise ValueError(
                f"a line model needs finite numbers and a direction that is not zero, got {self}. "
                "Refuse the step before a search sees it."
            )

    def value(self, step_length: float) -> float:
        """m(t)."""
        return self.loss - self.decrease(step_length)

    def decrease(self, step_length: float) -> float:
        """q(t) = f - m(t) = -t s - t² k / 2, without the cancellation of f."""
        return -step_length * (self.slope + step_length * self.curvature / 2)

    @property
    def minimizer(self) -> float:
        """The t >= 0 of least m(t): -s/k, or infinity where the model has no minimum."""
        return max(-self.slope, 0.0) / self.curvature if self.curvature > 0 else math.inf

    @property
    def rounding(self) -> float:
        """The change of loss that cannot be told from rounding: 10 u |f|."""
        return 10 * self.unit_roundoff * abs(self.loss)

    def rounding_level(self, trial: Trial) -> bool:
        """Whether losses may say nothing about the step: they differ by u^(2/3) |f| at most, and should not by more.

        A loss that is a sum of cancelling terms is worth far fewer digits than its dtype has, and nothing shows how
        many; u^(2/3) |f| is 2e-11 |f| in float64, 2e-5 |f| in float32. Where slopes decide although losses could have,
        that costs a gradient and does no harm. Equal losses alone prove nothing: the trial may lie on the other side
        of a valley.

        Source: Hager and Zhang, SIAM J. Optim. 16 (2005), who let slopes decide within 1e-6 |f|; the bound is ours.
        """
        most = self.unit_roundoff ** (2 / 3) * abs(self.loss)
        return abs(trial.loss - self.loss) <= most and abs(trial.step_length * self.slope) <= most

    def taylor_error(self, trial: Trial) -> float:
        """E(t) = f(w + t d) - m(t); not finite where the trial is not.

        Where the losses may differ by rounding only, the slopes still bound it: E'(t) = g(w + t d)·d - s - t k, and
        E = t E'/3 where the model lacks a cubic (the curvature is the Hessian's), t E'/2 where it lacks a quadratic
        (Gauss-Newton's). What the losses say is believed between the two.
        """
        t = trial.step_length
        error = (trial.loss - self.loss) + self.decrease(t)
        if trial.slope is not None and self.rounding_level(trial):
            change = t * (trial.slope - self.slope - t * self.curvature)
            low, high = sorted((change / 3, change / 2))
            return min(high, max(low, error))  # in this order NaN stays NaN
        return error

    def change(self, trial: Trial) -> float:
        """f(w + t d) - f, with that error."""
        if trial.slope is not None and self.rounding_level(trial):
            return self.taylor_error(trial) - self.decrease(trial.step_length)
        return trial.loss - self.loss
