"""What a user of the Newton-Krylov method chooses."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from imstep.curvature.choice import CurvatureChoice
from imstep.globalization import Damping, StepSearch
from imstep.optim.forcing import Forcing
from imstep.optim.solving import Solver


@dataclass(frozen=True)
class Strategies:
    """What a user chooses: see :class:`~imstep.optim.newton_krylov.NewtonKrylov`."""

    curvature: CurvatureChoice
    solver: Solver
    forcing: Forcing
    step: StepSearch
    damping: Damping
    momentum: bool
    tolerance: float
    max_trials: int
    variance_every: int

    def __post_init__(self) -> None:
        kinds = {
            "curvature": CurvatureChoice,
            "solver": Solver,
            "forcing": Forcing,
            "step": StepSearch,
            "damping": Damping,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}. "
                    "Pass an instance of a strategy, or leave it out."
                )
        if not isinstance(self.momentum, bool):
            raise TypeError(
                f"momentum is True or False, got {self.momentum!r}: how much of the last step is taken comes from the "
                "quadratic model."
            )
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is at least 0, got {self.tolerance}.")
        if self.max_trials < 1:
            raise ValueError(f"max_trials is at least 1, got {self.max_trials}.")
        if self.variance_every < 0:
            raise ValueError(f"variance_every is at least 1, or 0 for never, got {self.variance_every}.")

    def measures(self, step: int) -> bool:
        """Whether the gradient's variance is to be measured in the step of this number."""
        return self.variance_every > 0 and step % self.variance_every == 0


def short(strategy: Any) -> str:
    """A strategy as it is made, without what is by default."""
    if not hasattr(strategy, "__dataclass_fields__"):
        return strategy.__class__.__name__ + "()"
    chosen = {f.name: getattr(strategy, f.name) for f in fields(strategy)}
    shown = [f"{f.name}={_shown(chosen[f.name])}" for f in fields(strategy) if chosen[f.name] != _default(f)]
    return f"{type(strategy).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    return short(value) if hasattr(value, "__dataclass_fields__") else repr(value)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
