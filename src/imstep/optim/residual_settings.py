"""What a user of least squares chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from imstep.globalization import ContractionDamping
from imstep.linalg import Factorisation
from imstep.optim.balancing import Balancing
from imstep.optim.recall import EarlierDraws
from imstep.optim.scaling import Scaling, Unscaled

_MOST = 12
"""Corrections of a step that has come to too little, where it may have more than one."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses: see :class:`LeastSquares`."""

    damping: ContractionDamping
    factorisation: Factorisation
    scaling: Scaling
    corrections: int
    share: float
    momentum: float
    recall: EarlierDraws | None
    balance: Balancing | None
    tolerance: float
    max_trials: int

    def __post_init__(self) -> None:
        for name, kind in (("damping", ContractionDamping), ("factorisation", Factorisation), ("scaling", Scaling)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}.")
        if self.recall is not None and not isinstance(self.recall, EarlierDraws):
            raise TypeError(f"recall must be EarlierDraws, or None for nothing, got {self.recall!r}.")
        if self.balance is not None and not isinstance(self.balance, Balancing):
            raise TypeError(f"balance must be EqualTraces, EqualGradients, or None for nothing, got {self.balance!r}.")
        if self.corrections < 1 or self.max_trials < 1:
            raise ValueError(
                f"corrections and max_trials are at least 1, got {self.corrections} and {self.max_trials}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and less than 1, got {self.momentum}.")
        if not (0 <= self.share < math.inf and self.tolerance >= 0):
            raise ValueError(f"share and tolerance are at least 0, got {self.share} and {self.tolerance}.")

    @property
    def most_corrections(self) -> int:
        """Of a step that comes to too little without: beside a larger λ, and all of a trial anew, they cost little.

        Scaled parameters are those of fits, which begin far away: there a step that has to be saved leads astray.
        """
        further = self.corrections > 1 and isinstance(self.scaling, Unscaled)
        return max(self.corrections, _MOST) if further else self.corrections
