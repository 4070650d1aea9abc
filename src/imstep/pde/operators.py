"""Derivatives of a function of points, for equations of mathematical physics."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.scripted import unoptimised
from imstep.pde import elementwise, in_place, linear, normalisation, products  # noqa: F401  what functions do to jets
from imstep.pde.jet import Combination, ExpansionError, Jet

Field = Callable[[Tensor], Any]
"""Maps points (N, d) to values (N, ...), each point by itself."""


@dataclass(frozen=True, eq=False)
class Expansion:
    """A field and its derivatives at points.

    Attributes:
        value: u, (N, ...).
        first: ∂u/∂x_i, (N, ..., k) for the k directions.
        second: ∂²u/∂x_i² for the directions asked for, (N, ..., r); None where none was.
        laplacian: their sum over the directions asked for, (N, ...); None where none was.
    """

    value: Tensor
    first: Tensor
    second: Tensor | None = None
    laplacian: Tensor | None = None


def expand(
    field: Field,
    points: Tensor,
    *,
    directions: Tensor | None = None,
    second: Sequence[int] = (),
    laplacian: Sequence[int] | Mapping[int, float] = (),
) -> Expansion:
    """Value, first and second derivatives of a field with respect to its points, by one forward pass.

        u,   ∂u/∂x_i,   ∂²u/∂x_i²,   Σ_i ∂²u/∂x_i²

    The results have a graph to the field's parameters (not to the points), so that a loss of them can be trained by any
    optimizer; every weight is used a few times, whatever d is.

    Args:
        field: maps points (N, d) to values (N, ...), each point by itself: a network, or a function that calls it.
        points: (N, d), floating point.
        directions: (k, d), or (k, N, d) where they differ from point to point; None for the d coordinates.
        second: positions among the directions whose second derivatives are wanted one by one.
        laplacian: positions among the directions whose second derivatives are wanted as a sum, each once; with the
            factors that they have in it, ``{0: -4.0, 1: 1.0}``, where these are not 1.

    Returns:
        An :class:`Expansion`.

    Raises:
        ValueError: shapes do not fit, a position is none, out of range or repeated, or a factor no number.
        ExpansionError: the field does not depend on the points as far as can be seen, or derivatives would be lost.

    Cost: some 1 + k + r evaluations of the field, where nested ``torch.autograd.grad`` makes about 2 + 3 r of them in
        chains that have to be differentiated once more. ``laplacian`` counts 1 in r, however long it is.

    Source: forward Laplacian, Li et al., arXiv 2307.08214; collapsed Taylor mode, Dangel et al., arXiv 2505.13644.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> u = expand(lambda x: (x[:, 0] ** 2 * x[:, 1]).sin(), x, second=[0], laplacian=[0, 1])
        >>> u.value, u.first                                   # sin 2, (4 cos 2, cos 2)
        (tensor([0.9093]), tensor([[-1.6646, -0.4161]]))
    """
    _check(points, directions)
    lines = torch.eye(points.shape[1], device=points.device) if directions is None else directions
    lines, count = lines.to(points.dtype), len(lines)
    second, summed = _positions("second", second, count), _positions("laplacian", laplacian, count)
    if len(set(summed)) < len(summed):
        raise ValueError(f"laplacian names each direction once, got {tuple(summed)}.")
    coefficients = points.new_zeros(len(second) + bool(summed), count)
    for row, at in enumerate(second):
        coefficients[row, at] = 1
    if summed:
        coefficients[-1, summed] = points.new_tensor(_factors("laplacian", laplacian))
    lines = (lines if lines.dim() == 3 else lines[:, None]).expand(count, *points.shape).contiguous()
    try:
        with unoptimised():
            jet = field(Jet(points, lines, None, Combination(coefficients)))
    except RuntimeError as error:
        if "already has a forward gradient" not in str(error):
            raise
        raise ExpansionError(
            "the field that is expanded uses forward mode within itself, such as torch.func.jvp. Use pde.directional "
            "or another operator of imstep.pde there, or nested torch.autograd.grad for all of it."
        ) from error
    if not isinstance(jet, Jet) or jet.dim() < 1 or len(jet) != len(points):
        raise ExpansionError(_wrong_result(jet, len(points)))
    sums = jet.value.new_zeros(len(coefficients), *jet.shape) if jet.second is None else jet.second
    return Expansion(
        jet.value,
        jet.first.movedim(0, -1),
        sums[: len(second)].movedim(0, -1) if second else None,
        sums[-1] if summed else None,
    )


def gradient(field: Field, points: Tensor) -> Tensor:
    """∇u at points, (N, ..., d): for a network with one output, ``gradient(net, x)[..., 0]`` is ∂u/∂x_0, (N, 1).

    Args and errors: as for :func:`expand`.

    Example:
        >>> gradient(lambda x: x.square().sum(1), torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])
    """
    return expand(field, points).first


def divergence(field: Field, points: Tensor) -> Tensor:
    """∇·u = Σ_i ∂u_i/∂x_i of a field with d components at points, (N,).

    Args and errors: as for :func:`expand`; ``field`` maps (N, d) to (N, d).

    Example:
        >>> divergence(lambda x: x ** 2, torch.tensor([[1.0, 2.0]]))
        tensor([6.])
    """
    first = expand(field, points).first
    if first.shape != (*points.shape, points.shape[1]):
        raise ValueError(
            f"a divergence needs a field with as many components as coordinates, {tuple(points.shape)}, got "
            f"{tuple(first.shape[:-1])}."
        )
    return first.diagonal(dim1=1, dim2=2).sum(1)


def laplacian(field: Field, points: Tensor, over: Sequence[int] | Mapping[int, float] | None = None) -> Tensor:
    """Δu = Σ_i ∂²u/∂x_i² at points, of the shape of u.

    Args:
        field, points: as for :func:`expand`.
        over: the coordinates that are summed over, each once; None for all. With factors, as ``{0: -4.0, 1: 1.0}`` for
            ∂²u/∂x_1² - 4 ∂²u/∂x_0², it is that sum.

    Example:
        >>> laplacian(lambda x: (x ** 3).sum(1, keepdim=True), torch.tensor([[1.0, 2.0]]))
        tensor([[18.]])
    """
    _check(points, None)
    chosen = _positions("over", range(points.shape[1]) if over is None else over, points.shape[1])
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"over names one coordinate or more, each once, got {tuple(chosen)}; leave it out for all.")
    # Coordinates that no sum asks for need not be followed.
    lines = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)[chosen]
    factors = dict(enumerate(_factors("over", over))) if isinstance(over, Mapping) else range(len(lines))
    result = expand(field, points, directions=lines, laplacian=factors).laplacian
    assert result is not None
    return result


def directional(field: Field, points: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, and its first and second derivative along a direction v: (v·∇)u and (v·∇)²u, each of the shape of u.

    Args:
        field, points: as for :func:`expand`.
        direction: v, (d,), or (N, d) where it differs from point to point.

    A mixed derivative is the difference of two: ∂²u/∂x∂y = ((v·∇)²u - (w·∇)²u)/4, v = (1, 1), w = (1, -1).

    Example:
        >>> u, slope, bend = directional(lambda x: x.prod(1), torch.tensor([[2.0, 3.0]]), torch.tensor([1.0, 1.0]))
        >>> u, slope, bend
        (tensor([6.]), tensor([5.]), tensor([2.]))
    """
    result = expand(field, points, directions=direction[None], second=[0])
    assert result.second is not None
    return result.value, result.first[..., 0], result.second[..., 0]


def _positions(name: str, positions: Any, count: int) -> list[int]:
    """Positions as numbers, out of any sequence or tensor of them."""
    try:
        found = [operator.index(at) for at in positions if getattr(at, "dtype", type(at)) not in (bool, torch.bool)]
        complete = len(found) == len(positions)
    except TypeError:
        found, complete = [], False
    if not complete or any(not -count <= at < count for at in found):
        raise ValueError(
            f"{name} holds positions of the {count} directions, from 0, such as [0, 1], got {positions!r}."
        )
    return [at % count for at in found]


def _factors(name: str, positions: Sequence[int] | Mapping[int, float]) -> list[float]:
    """Of the second derivatives in a sum."""
    factors = list(positions.values()) if isinstance(positions, Mapping) else [1.0] * len(positions)
    if not all(isinstance(factor, Real) and math.isfinite(factor) for factor in factors):
        raise ValueError(
            f"the factors of {name} are numbers, got {factors!r}. One that is trained, or differs from point to point, "
            "is multiplied with its derivative: ask for second=[...] and add these up."
        )
    return [float(factor) for factor in factors]


def _check(points: Tensor, directions: Tensor | None) -> None:
    if points.dim() != 2 or not points.is_floating_point():
        raise ValueError(
            f"points have the shape (N, d) and a floating-point dtype, got {tuple(points.shape)} of {points.dtype}. "
            "Put coordinates side by side: torch.stack([x, t], 1)."
        )
    if directions is not None and directions.shape[1:] not in (points.shape[1:], points.shape):
        raise ValueError(
            f"directions have the shape (k, {points.shape[1]}) or (k, {len(points)}, {points.shape[1]}), got "
            f"{tuple(directions.shape)}."
        )


def _wrong_result(result: Any, count: int) -> str:
    if isinstance(result, Tensor) and not isinstance(result, Jet):
        return (
            "the field's value does not depend on the points as far as PyTorch's functions show: it was detached, or "
            "computed under no_grad or outside PyTorch. Return what the network computes from its argument."
        )
    got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(type(result).__name__)
    return f"the field maps {count} points to values of shape ({count}, ...), got {got}."
