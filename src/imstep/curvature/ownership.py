"""Which row of a layer belongs to which residual, found by backward passes with coded cotangents.

Where residuals are computed independently of each other, every row of a layer's gradient is a multiple of the cotangent
of one residual. With the cotangent c_i = 2^(digit of i) in place of 1, the row grows by a power of two that spells the
digit: exactly, whatever the rounding. A row that is no multiple depends on several residuals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.curvature.squares import Residuals
from imstep.curvature.uses import Rows, Use

_BITS = 6
"""Of a digit; 2^63 times a gradient is a number in float32 as well."""


@dataclass(frozen=True, eq=False)
class OwnedRows:
    """What the uses of the parameters add to the gradients of the residuals.

    Attributes:
        pieces: for each parameter, addends with the residuals (R,) that they belong to; -1 for addends of zero.
        sums: for each parameter, its gradient for the sum of all residuals as autograd computes it.
        passes: backward passes that this took.
    """

    pieces: list[list[tuple[Rows, Tensor]]]
    sums: list[Tensor]
    passes: int


def owned_rows(residuals: Residuals, uses: Sequence[Use], tensors: Sequence[Tensor]) -> OwnedRows | None:
    """The addends of all uses with their residuals; None where residuals are not independent of each other.

    Residuals that share rows, such as the components of a vector or two conditions at the same points, are taken in
    groups of which each is independent in itself.

    Args:
        tensors: the parameters.

    Cost: two backward passes a group for up to 64 residuals, three for up to 4,096, four for up to 262,144.
    """
    shifts = range(0, max(len(residuals.values) - 1, 1).bit_length(), _BITS)
    for groups in _groupings(residuals):
        passes = len(groups) * (1 + len(shifts))
        found = OwnedRows([[] for _ in tensors], [torch.zeros_like(p) for p in tensors], passes)
        if all(_take(residuals, uses, tensors, members, shifts, found) for members in groups):
            return found
    return None


def _groupings(residuals: Residuals) -> Iterator[list[Tensor]]:
    """Ways to part the residuals, from coarse to fine: together, by output, by output and component.

    Each group is a vector (N,) of ones and zeros.
    """
    none = torch.zeros_like(residuals.values)
    yield [none + 1]
    spans = sorted({(o.start, tuple(o.z.shape)) for o in residuals.outputs})
    for by_component in (False, True):
        groups = []
        for start, shape in spans:
            size = torch.Size(shape).numel()
            components = size // max(shape[0], 1) if by_component and shape else 1
            for component in range(components):
                groups.append(none.clone())
                groups[-1][start + component : start + size : components] = 1
        yield groups


def _take(
    residuals: Residuals,
    uses: Sequence[Use],
    tensors: Sequence[Tensor],
    members: Tensor,
    shifts: range,
    found: OwnedRows,
) -> bool:
    """Add a group, (N,) ones and zeros, to what is found; whether it is independent."""
    plain, sums = _spread(residuals, uses, members, tensors)
    count = len(members)
    index = torch.arange(count, device=members.device)
    owners = [torch.zeros(len(rows), dtype=torch.long, device=members.device) for rows in plain]
    for shift in shifts:
        digit = (index >> shift) & (2**_BITS - 1)
        coded, _ = _spread(residuals, uses, torch.ldexp(members, digit))
        for owner, one, many in zip(owners, plain, coded, strict=True):
            power = _power_of_two(one, many)
            if power is None:
                return False
            owner += power << shift
    if any(bool((owner >= count).any()) for owner in owners):
        return False
    for use, rows, owner in zip(uses, plain, owners, strict=True):
        found.pieces[use.parameter].append((use.rows(rows), torch.where(rows.any(1), owner, -1)))
    for total, part in zip(found.sums, sums, strict=True):
        total += 0 if part is None else part
    return True


def _spread(
    residuals: Residuals, uses: Sequence[Use], cotangent: Tensor, tensors: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The rows of every use, and the gradients of ``tensors``, from one backward pass."""
    edges = list(dict.fromkeys(use.edge for use in uses))
    inputs: list[Tensor | GradientEdge] = [*edges, *tensors]
    gradients = residuals.pull_back(cotangent, inputs) if inputs else ()
    at_edge = dict(zip(edges, gradients, strict=False))
    rows = []
    for use in uses:
        d = at_edge[use.edge]
        assert d is not None  # the edge was met on the way from the outputs
        rows.append(use.spread(d))
    return rows, list(gradients[len(edges) :])


def _power_of_two(one: Tensor, many: Tensor) -> Tensor | None:
    """The k (R,) with many = 2^k one for each row; None where a row is no such multiple.

    0 for rows of zeros, and for rows that are not finite, which the gradient will show.
    """
    size, larger = one.abs().amax(1), many.abs().amax(1)
    told = (size > 0) & larger.isfinite()
    power = torch.where(told, larger / size, 1.0).log2().round_().clamp_(0, 2**_BITS - 1)
    error = torch.addcmul(many, one, torch.exp2(power)[:, None], value=-1).abs_().amax(1)
    return power.long() if bool(((error <= 1e-3 * larger) | ~larger.isfinite()).all()) else None
