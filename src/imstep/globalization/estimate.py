"""Where the Taylor monitor's prediction of the model's error comes from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from imstep.globalization.model import LineModel


class ErrorEstimate(ABC):
    """A prediction of E(t) = f(w + t d) - m(t) before any trial."""

    @property
    def needs_derivatives(self) -> bool:
        """Whether the model must hold the exact derivatives along the direction."""
        return False

    @property
    @abstractmethod
    def initial(self) -> float:
        """M before the first step."""

    @abstractmethod
    def within(self, theta: float, third_derivative: float, model: LineModel) -> float:
        """The largest t up to which the predicted |E| is at most theta times the model's decrease, or infinity."""

    @abstractmethod
    def remembered(self, third_derivative: float, model: LineModel, step_length: float, error: float) -> float:
        """M after a step, from M before it and the error E(t) of its accepted trial."""


@dataclass(frozen=True)
class RunningEstimate(ErrorEstimate):
    """|E| ≈ M ‖t d‖³ / 6 with the M of the last steps.

    A larger M is believed at once, a smaller one step by step: half of M is forgotten, or half of its logarithm's
    distance from what the trial has shown.

        M <- max(6 |E| / ‖t d‖³, min(M/2, (M · 6 |E| / ‖t d‖³)^(1/2)))

    Errors are taken for what the rounding of two losses leaves of them: at least for the first, at most for the second.

    Args:
        third_derivative: M before the first step, >= 0.

    Raises:
        ValueError: M is negative or not finite.

    Cost: nothing.
    """

    third_derivative: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.third_derivative < math.inf:
            raise ValueError(f"third_derivative must be finite and not negative, got {self.third_derivative}.")

    @property
    def initial(self) -> float:
        return self.third_derivative

    def within(self, theta: float, third_derivative: float, model: LineModel) -> float:
        return within_cubic(theta, third_derivative, model)

    def remembered(self, third_derivative: float, model: LineModel, step_length: float, error: float) -> float:
        least = third_derivative_for(model, step_length, max(abs(error) - model.rounding, 0.0))
        most = third_derivative_for(model, step_length, abs(error) + model.rounding)
        return max(least, min(third_derivative / 2, math.sqrt(third_derivative) * math.sqrt(most)))


@dataclass(frozen=True)
class ExactEstimate(ErrorEstimate):
    """E ≈ t² (dᵀHd - k) / 2 + t³ D³f[d, d, d] / 6, from an evaluation on nested complex-step numbers.

    Knows the error of this direction at this point, where :class:`RunningEstimate` knows the last ones; and that of
    another curvature matrix than the Hessian. Remembers nothing.

    Cost: an evaluation per step that counts 25/3 gradients.

    Source: our choice.
    """

    @property
    def needs_derivatives(self) -> bool:
        return True

    @property
    def initial(self) -> float:
        return 0.0

    def within(self, theta: float, third_derivative: float, model: LineModel) -> float:
        exact = model.derivatives
        if exact is None:
            raise ValueError("an exact estimate needs the model's derivatives. Give the model `derivatives`.")
        square, cube = (exact.second - model.curvature) / 2, exact.third / 6
        if not math.isfinite(square + cube):
            return math.inf  # no evidence
        # |E|/t = θ q/t, for either sign of E.
        slack, fall = theta * -model.slope, theta * model.curvature / 2
        return min(first_root(cube, square + fall, -slack), first_root(-cube, -square + fall, -slack))

    def remembered(self, third_derivative: float, model: LineModel, step_length: float, error: float) -> float:
        return 0.0


def within_cubic(theta: float, third_derivative: float, model: LineModel) -> float:
    """The root t of M ‖t d‖³ / 6 = θ q(t); infinite where the error never reaches θ q."""
    # In the length t‖d‖, so that no cube of the norm can overflow.
    slope, curvature = model.slope / model.norm, model.curvature / model.norm / model.norm
    return first_root(third_derivative / 6, theta * curvature / 2, theta * slope) / model.norm


def third_derivative_for(model: LineModel, step_length: float, error: float) -> float:
    """The M with M ‖t d‖³ / 6 = |E|."""
    length = step_length * model.norm
    return 6 * abs(error) / length / length / length


def first_root(a: float, b: float, c: float) -> float:
    """The least x > 0 with a x² + b x + c = 0, for c < 0; infinite if there is none."""
    square = b * b - 4 * a * c
    if square < 0:
        return math.inf
    root = math.sqrt(square)
    # Each form adds numbers of one sign.
    if b > 0:
        return -2 * c / (b + root)
    return (root - b) / (2 * a) if a > 0 else math.inf
