"""How far the parameters of a fit are determined by its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imstep.curvature import Jacobian
from imstep.insight.outputs import chosen
from imstep.uncompiled import uncompiled


@dataclass(frozen=True, eq=False)
class ParameterCovariance:
    """The covariance of fitted parameters.

    Attributes:
        matrix: C, (n, n), of the dtype of the parameters; zero for those that were held. What else is told here is
            computed in float64, as squares of small or large errors leave the range of float32.
        variance: s², of a residual.
        distance: how far the minimum is from here, in standard errors, if the residuals were linear; about 0 for a fit
            that has come to its end.
    """

    matrix: Tensor
    variance: float
    distance: float
    _x: Tensor
    _exact: Tensor

    @property
    def standard_errors(self) -> Tensor:
        """Of each parameter, of the shape of the parameters."""
        return self._exact.diagonal().sqrt().to(self._x.dtype).reshape(self._x.shape)

    @property
    def correlation(self) -> Tensor:
        """Of the parameters with each other, (n, n); nan for those that were held."""
        errors = self._exact.diagonal().sqrt()
        return (self._exact / errors[:, None] / errors).to(self._x.dtype)

    def standard_errors_of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Standard errors of a function of the parameters, such as the fitted curve; of the shape of its values.

        Args:
            function: called with the parameters.
        """
        rows, values = _derivative(function, self._x)
        rows = rows.double()
        variances = ((rows @ self._exact) * rows).sum(1).clamp(min=0)
        return variances.sqrt().to(values.dtype).reshape(values.shape)


@uncompiled
def parameter_covariance(
    residuals: Callable[[Tensor], Tensor],
    x: Tensor,
    variance: float | None = None,
    free: Tensor | Sequence[int] | None = None,
) -> ParameterCovariance:
    """The covariance of parameters that were fitted by least squares.

        C = s² (JᵀJ)⁻¹,   J the Jacobian of the residuals,   s² = ‖r‖² / (m - n) unless given

    Args:
        residuals: called with the parameters; returns m residuals, of any shape. Where measurements have errors of
            their own, residuals divided by them.
        x: the fitted parameters, a real tensor of any shape; n entries.
        variance: s² >= 0 of a residual, where it is known; 1 for residuals that were divided by their errors.
        free: positions of the parameters that were free, or a mask; without those that ended on a bound or were held.

    Raises:
        ValueError: the data do not determine the parameters, with the combination that is free; there are no more
            residuals than parameters, and the variance is not given; the variance is no number >= 0; ``free`` names no
            parameters, others than there are, or one twice.
        TypeError: ``x`` is no real floating-point tensor.

    Cost: min(m, n) products with J; a singular value decomposition of m by n.

    Source: Seber and Wild, Nonlinear Regression (1989), section 2.1.2.

    Example:
        >>> t = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> y, x = torch.tensor([0.1, 0.9, 2.1, 2.9]), torch.tensor([0.06, 0.96])
        >>> parameter_covariance(lambda b: b[0] + b[1] * t - y, x).standard_errors
        tensor([0.1058, 0.0566])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is the tensor of fitted parameters, got {type(x).__name__}. Pass torch.as_tensor(x).")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; parameters of a fit are real floating point. Pass x.double().")
    variance = None if variance is None else _checked(variance)
    every = torch.arange(x.numel(), device=x.device)
    own = every if free is None else chosen(free, x.numel(), x.device, "free")
    if not len(own):
        raise ValueError("free names no parameter: nothing was fitted.")
    if len(own.unique()) < len(own):
        raise ValueError(f"free names each parameter once, got {own.tolist()}.")
    J, r = _derivative(residuals, x)
    J, r, m, n = J[:, own].double(), r.reshape(-1).double(), r.numel(), len(own)
    if not bool(torch.isfinite(J).all() and torch.isfinite(r).all()):
        raise ValueError("residuals or their derivatives are not finite at these parameters: they are no fit.")
    if variance is None and m <= n:
        raise ValueError(
            f"{m} residuals and {n} free parameters leave nothing to estimate the variance from. Pass variance=, or "
            "hold parameters by free=."
            + (" Return the residuals, not the sum of their squares." if m == 1 else "")
        )
    sizes = J.norm(dim=0)
    if not bool((sizes > 0).all()):
        raise ValueError(f"the residuals do not depend on parameter {int(own[sizes.argmin()])}. Hold it by free=.")
    # Units of the parameters must not decide what counts as rounding.
    left, values, right = torch.linalg.svd(J / sizes, full_matrices=False)
    if m < n or not float(values[-1]) > max(m, n) * torch.finfo(x.dtype).eps * float(values[0]):
        if m < n:
            right = torch.linalg.svd(J / sizes)[2]
        worst = right[-1] / sizes
        worst = worst / worst.abs().max()
        worst = worst * worst[worst.abs() > 0.5][0].sign()  # a singular vector has no sign of its own
        shown = ", ".join(f"{value:.3g}" for value in worst.tolist()[:8])
        raise ValueError(
            "the data do not determine the parameters: moving the free ones along "
            f"({shown}{', ...' if n > 8 else ''}) changes no residual. Hold one of them by free=, or measure more."
        )
    if variance is None:
        variance = float(r @ r) / (m - n)
    root = (right / values[:, None]) / sizes  # C = s² rootᵀ root
    matrix = torch.zeros(x.numel(), x.numel(), dtype=torch.float64, device=x.device)
    matrix[own[:, None], own] = variance * (root.mT @ root)
    away = float((left.mT @ r).norm())
    distance = away / variance**0.5 if variance > 0 else (0.0 if away == 0 else float("inf"))
    return ParameterCovariance(matrix.to(x.dtype), variance, distance, x.detach(), matrix)


def _checked(variance: Any) -> float:
    """The variance of a residual as a number."""
    if isinstance(variance, (list, tuple)) or math.prod(getattr(variance, "shape", ())) != 1:
        raise ValueError(
            "variance is one number, that of each residual. Where measurements have errors of their own, let residuals "
            "be divided by them, in the fit, too, and pass variance=1.0."
        )
    try:
        number = float(variance)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"variance is a number >= 0, got {variance!r}: that of a residual, or None to estimate it.")
    return number


def _derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The Jacobian (m, n) of a function of the parameters, and its values."""
    b = nn.Parameter(x.detach().clone())
    found = Jacobian(lambda: function(b), [b])
    return found.to_dense(limit=2**14), found.outputs
