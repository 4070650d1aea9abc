"""What leaving out weights costs, the others being adjusted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.insight.outputs import chosen, parameters_of
from imstep.linalg import DiagonalOperator, InverseOperator, LinearOperator
from imstep.uncompiled import uncompiled

_CHUNK = 256
"""Columns of the inverse at a time."""

_LIMIT = 4096
"""Weights that are all looked at where none are chosen; each takes a solve."""


@dataclass(frozen=True, eq=False)
class Saliencies:
    """What leaving out each of some weights costs.

    Attributes:
        index: which weights, positions in the vector of parameters, (k,).
        values: by how much the loss rises when this one is zero and the others are adjusted, (k,).
        inverse_diagonal: entries of (H + λI)⁻¹ for them, (k,).
    """

    index: Tensor
    values: Tensor
    inverse_diagonal: Tensor


@dataclass(frozen=True, eq=False)
class Removal:
    """Weights left out together.

    Attributes:
        increase: by how much the loss rises, to second order.
        update: what to add to the vector of parameters, (n,); those left out are zero then.
    """

    increase: float
    update: Tensor


@uncompiled
def saliencies(
    curvature: LinearOperator,
    index: Tensor | Sequence[int] | None = None,
    *,
    damping: float = 0.0,
    rtol: float | None = None,
) -> Saliencies:
    """The scores of Optimal Brain Surgeon: by how much the loss rises when a weight is set to zero.

        sⱼ = wⱼ² / (2 [(H + λI)⁻¹]ⱼⱼ)

    to second order, about a minimum, with the other weights adjusted to it. With a diagonal matrix, such as
    :class:`~imstep.curvature.GaussNewtonDiagonal`, it is Optimal Brain Damage, sⱼ = wⱼ² hⱼⱼ / 2.

    Args:
        curvature: H, of a model's loss; positive definite with the damping.
        index: which weights, positions in the vector of parameters; all of them unless given.
        damping: λ >= 0; for a matrix that is singular or not definite.
        rtol: of the solves, as for :meth:`~imstep.linalg.LinearOperator.inverse`.

    Raises:
        NotSolvedError: a solve did not succeed, as where H + λI is singular.
        ValueError: an entry of the inverse's diagonal is not positive: H + λI is not positive definite; too many
            weights for a solve each.

    Cost: a solve for each weight, in blocks; none for a diagonal matrix.

    Source: Hassibi and Stork, NIPS 1992; LeCun, Denker and Solla, NIPS 1989.

    Example:
        >>> import imstep
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> H = imstep.Hessian(lambda: (w[0] - 1) ** 2 + (w.sum() - 3) ** 2, [w])
        >>> saliencies(H).values
        tensor([1., 2.])
    """
    parameters, size = parameters_of(curvature), curvature.size
    every = torch.arange(size, device=curvature.device)
    wanted = every if index is None else chosen(index, size, curvature.device)
    if isinstance(curvature, DiagonalOperator):
        diagonal = 1 / (curvature.diagonal[wanted] + damping)
        positive = diagonal > 0
    elif index is None and size > _LIMIT:
        raise ValueError(
            f"saliencies of all {size:,} weights take a solve each; up to {_LIMIT:,} are. Pass the index of those in "
            "question, take a block (H.block(layer)), or a diagonal matrix (GaussNewtonDiagonal)."
        )
    else:
        inverse = curvature.inverse(damping, rtol=rtol)
        pairs = [_diagonal(_columns(inverse, some), some) for some in wanted.split(_CHUNK)]
        diagonal, positive = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if not bool(positive.all()):
        raise _indefinite(damping)
    return Saliencies(wanted, parameters.get()[wanted] ** 2 / (2 * diagonal), diagonal)


@uncompiled
def removal(
    curvature: LinearOperator, index: Tensor | Sequence[int], *, damping: float = 0.0, rtol: float | None = None
) -> Removal:
    """Several weights left out at once, and the best adjustment of the others.

        δ = -H⁻¹E (EᵀH⁻¹E)⁻¹ Eᵀw,   increase = 1/2 wᵀE (EᵀH⁻¹E)⁻¹ Eᵀw,   E the columns of the identity in ``index``

    Args:
        curvature, damping, rtol: as for :func:`saliencies`.
        index: which weights, without repetition, (k,).

    Raises:
        NotSolvedError, ValueError: as for :func:`saliencies`.

    Cost: k solves.

    Source: Hassibi and Stork, NIPS 1992; for several weights, Kurtic et al., EMNLP 2022 (arXiv 2203.07259).

    Example:
        >>> import imstep
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> H = imstep.Hessian(lambda: (w[0] - 1) ** 2 + (w.sum() - 3) ** 2, [w])
        >>> found = removal(H, [1])
        >>> round(found.increase, 4), found.update
        (2.0, tensor([ 1., -2.]))
    """
    own = parameters_of(curvature).get()
    wanted = chosen(index, curvature.size, own.device)
    if len(wanted.unique()) < len(wanted):
        raise ValueError("a weight is named twice in the index; it can be left out only once.")
    columns = _columns(curvature.inverse(damping, rtol=rtol), wanted)
    inner = columns[wanted].double()
    factor, failed = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
    if int(failed) or not bool(_diagonal(columns, wanted)[1].all()):
        raise _indefinite(damping)
    weights = own[wanted].double()
    multipliers = torch.cholesky_solve(weights[:, None], factor)[:, 0]
    update = -(columns @ multipliers.to(columns))
    update[wanted] = -own[wanted]  # exactly zero afterwards, whatever the rounding
    return Removal(float(weights @ multipliers) / 2, update)


def _columns(inverse: InverseOperator, index: Tensor) -> Tensor:
    """Columns of the inverse, (n, k)."""
    identity = torch.zeros(len(index), inverse.size, dtype=inverse.dtype, device=inverse.device)
    identity[torch.arange(len(index), device=index.device), index] = 1
    return inverse @ identity.mT


def _diagonal(columns: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal's entries in columns of the inverse (n, k), and whether they are positive beyond rounding."""
    diagonal = columns[index].diagonal()
    return diagonal, diagonal > torch.finfo(columns.dtype).eps * columns.abs().amax(0)


def _indefinite(damping: float) -> ValueError:
    return ValueError(
        "the curvature is not positive definite with this damping: its inverse has a diagonal entry that is not "
        f"positive, and a score would have no meaning. Raise damping above {damping:g}, or take a Gauss-Newton matrix."
    )
