"""What weight decay adds to a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector


class Penalty:
    """½ Σ λ_p ‖w_p‖² over the parameters p.

    Args:
        rates: λ_p >= 0 of each parameter.
        parameters: the vector w.
        mask: zeros for the entries (n,) that are held fixed; None where none is.

    Attributes:
        rates: as given.
        factors: λ, entry by entry (n,): the gradient is λ w, the product with a vector λ v.

    Source: as ``torch.optim.SGD`` and, for the complex parameters' pairs of reals, its ``|w|²``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> penalty = Penalty([0.5], ParameterVector([w]))
        >>> penalty.value(torch.tensor([1.0, 2.0])), penalty.factors
        (1.25, tensor([0.5000, 0.5000]))
    """

    def __init__(self, rates: Sequence[float], parameters: ParameterVector, mask: Tensor | None = None) -> None:
        self.rates, self._parameters, self._mask = tuple(rates), parameters, mask
        factors = parameters.spread(rates)
        self.factors = factors if mask is None else mask * factors

    @classmethod
    def of(cls, rates: Sequence[float], parameters: ParameterVector) -> Penalty | None:
        """None where all rates are 0."""
        return cls(rates, parameters) if any(rates) else None

    def within(self, used: Sequence[bool], mask: Tensor | None) -> Penalty:
        """Without the parameters that the loss does not depend on, and the entries that hooks hold fixed.

        As in PyTorch, where a parameter without a gradient is let be.
        """
        if all(used) and mask is None:
            return self
        rates = [rate if is_used else 0.0 for rate, is_used in zip(self.rates, used, strict=True)]
        return Penalty(rates, self._parameters, mask)

    def times(self, factor: float, parameters: ParameterVector | None = None) -> Penalty:
        """With all λ multiplied by ``factor`` > 0; of ``parameters`` that stand for the same, if they are given."""
        return Penalty([factor * rate for rate in self.rates], parameters or self._parameters, self._mask)

    @property
    def alike(self) -> bool:
        """Whether all entries have one λ."""
        return self._mask is None and len(set(self.rates)) == 1

    def value(self, w: Tensor) -> float:
        """½ Σ λ w² at w (n,)."""
        return float((self.factors * w).mul_(w).sum(dtype=torch.float64)) / 2
