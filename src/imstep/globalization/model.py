"""The quadratic model of the loss along a direction."""

from __future__ import annotations

import math
from dataclasses import dataclass


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

    def error_by_loss(self, step_length: float, trial_loss: float) -> float:
        """E(t) = f(w + t d) - m(t), measured by a loss."""
        return (trial_loss - self.loss) + self.decrease(step_length)

    def error_by_gradient(self, step_length: float, trial_slope: float) -> float:
        """E(t) from E'(t) = f'(w + t d)·d - s - t k, as E = t E'/3: exact for a cubic.

        Slopes still resolve an error that the rounding of two nearly equal losses hides.
        """
        return step_length * (trial_slope - self.slope - step_length * self.curvature) / 3
