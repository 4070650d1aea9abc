"""The diagonal of a Gauss-Newton matrix, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from imstep.complexstep.islands import plain
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.gauss_newton import GaussNewton
from imstep.curvature.hessian import Hessian
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import JacobianRows, ResidualJacobian
from imstep.curvature.state import RandomState
from imstep.linalg import DiagonalOperator
from imstep.linalg.space import Space
from imstep.uncompiled import uncompiled

_ROOM = 2**26
"""Entries of rows, or of the Hessians of the cases' losses, that are formed at once."""


@uncompiled
class GaussNewtonDiagonal(DiagonalOperator):
    """The diagonal of the Gauss-Newton matrix of a loss L of a model's outputs, without a product for each entry.

        diag(Jᵀ L'' J) = Σ λ ρ'²,   ρ = Vᵀ z,   L'' = V λ Vᵀ case by case

    Args:
        closure: returns ``(outputs, targets)``; the outputs are one tensor, with cases along its first dimension.
        params: as for :class:`GaussNewton`.
        loss: as for :class:`GaussNewton`; a sum or mean over cases.

    Attributes:
        diagonal: (n,).
        loss: f(w), 0-dim.

    Raises:
        ValueError: the loss couples cases, or depends on the parameters other than by the outputs.
        NoResidualsError: the model couples cases, as batch normalisation does, and is too large.

    Cost: as :class:`GaussNewton` to build, a product with it as a check, and a :class:`ResidualJacobian` with one row
        for each output of each case.

    Source: Dangel, Kunstner and Hennig, ICLR 2020 (arXiv 1912.10985), section 2.3.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> D = GaussNewtonDiagonal(lambda: (model(x), torch.zeros(2, 1)), model)
        >>> D.diagonal
        tensor([10.,  4.])
    """

    def __init__(
        self,
        closure: Callable[[], tuple[Tensor, Any]],
        params: nn.Module | Iterable[Tensor],
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self._parameters, evaluate = ParameterVector(params), loss or nn.MSELoss()
        before = RandomState(self._parameters.device)
        seen: list[tuple[Any, Any]] = []

        def watched() -> tuple[Tensor, Any]:
            pair = closure()
            if not seen:
                seen.append(pair)
            return pair

        whole = GaussNewton(watched, self._parameters.tensors, evaluate)
        outputs, targets = seen[0]
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            raise ValueError(
                "the exact diagonal needs one tensor of outputs with cases along its first dimension; the closure "
                "returned something else. Join them with torch.cat, or estimate: spectral.diagonal(GaussNewton(...))."
            )
        vectors, values = _eigen(plain(outputs).detach(), targets, evaluate)
        after = RandomState(self._parameters.device)
        before.restore()
        rows = self._rows(closure, vectors)
        after.restore()
        self._check(whole, rows, values)
        super().__init__(_weighted_squares(rows, values).to(self._parameters.dtype))
        self.loss = whole.loss

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self._parameters, self._parameters

    def _rows(self, closure: Callable[[], tuple[Tensor, Any]], vectors: Tensor) -> ResidualJacobian:
        """The derivative of ρ."""

        def half_square() -> Tensor:
            outputs = closure()[0].reshape(len(vectors), 1, -1)
            return (outputs @ vectors).square().sum() / 2

        frozen = FrozenClosure(half_square, self._parameters)
        try:
            return ResidualJacobian.at(frozen, self._parameters, KnownOwners())
        finally:
            frozen.leave(accepted=False)

    def _check(self, whole: GaussNewton, rows: JacobianRows, values: Tensor) -> None:
        """Raise unless Σ λ (ρ'v)² is vᵀG v for a random v."""
        generator = torch.Generator(self._parameters.device).manual_seed(0)
        v = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype, device=rows.device)
        expected = float(v @ (whole @ v.to(whole.dtype)).double())
        squares = (rows @ v).square()
        accuracy = torch.finfo(whole.dtype).eps ** 0.5 * float(values.abs() @ squares)
        if not abs(float(values @ squares) - expected) <= accuracy + torch.finfo(whole.dtype).tiny:
            raise ValueError(
                "the Gauss-Newton matrix is no sum over cases: the loss couples cases, or depends on the parameters "
                "other than by the outputs, as by weight decay. Leave that out of the loss, or estimate the diagonal: "
                "spectral.diagonal(GaussNewton(...), rtol=1e-2)."
            )


def _eigen(outputs: Tensor, targets: Any, loss: Callable[[Any, Any], Tensor]) -> tuple[Tensor, Tensor]:
    """V of each case, (N, C, C), and λ, (N C,)."""
    cases, width = len(outputs), outputs[0].numel() if len(outputs) else 0
    if cases * width**2 > _ROOM:
        raise ValueError(
            f"{cases} cases of {width} outputs each are too many for the exact diagonal, which holds {width}² numbers "
            "for each. Use fewer cases at a time and add up, or estimate: spectral.diagonal(GaussNewton(...))."
        )
    z = outputs.clone().requires_grad_()
    matrix = Hessian(lambda: loss(z, targets), [z])
    # Where cases are apart one direction stands for the same output of all of them.
    directions = torch.eye(width, dtype=matrix.dtype, device=matrix.device).repeat(cases, 1)
    blocks = (matrix @ directions).view(cases, width, width).double()
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    return vectors.to(outputs.dtype), values.reshape(-1)


def _weighted_squares(rows: JacobianRows, weights: Tensor) -> Tensor:
    """Σ_i weight_i row_i², (n,)."""
    total = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
    chunk = max(1, _ROOM // max(1, rows.shape[1]))
    for index in torch.arange(rows.shape[0], device=rows.device).split(chunk):
        total += weights[index] @ rows.rows(index).written_out().square()
    return total
