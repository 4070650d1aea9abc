"""How a parameter comes to the output of an operator, example by example, told by the operator's linear map alone.

Of y = U(p), linear in p, the map shows what U is made of: a row for each row of the output, a factor for each of its
entries, or which rows of a table it looks up. Each finding is compared with the map on random numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from imstep.complexstep.tensor import Window

Draw = Callable[[tuple[int, ...]], Tensor]
"""Random signs of a shape."""

Map = Callable[[Tensor], Tensor]
"""From a change of the parameter to that of the output; may be given more columns than the parameter has."""

_ROOM = 2**27
"""Entries that a form may keep, or that are asked for at once."""

_BITS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).float() * 2 - 1
"""The signs that a byte stands for."""


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random signs, float32: eight from a byte that is drawn, since a number for each costs more than its product."""
    count = math.prod(shape)
    drawn = torch.empty(count // 64 + 1, dtype=torch.int64, device=generator.device)
    drawn.random_(-(2**63), None, generator=generator)
    spread = _BITS.to(drawn.device).index_select(0, drawn.view(torch.uint8).int())
    return spread.view(-1)[:count].view(shape)


class UseForm(ABC):
    """U of each of N examples: y_i = U_i p.

    Args:
        output: how the output looks, its first dimension being N times as long as that of an example.
        examples: N.
    """

    def __init__(self, output: torch.Size, examples: int) -> None:
        self.shape, self.examples = output, examples

    @abstractmethod
    def noise(self, draw: Draw) -> Tensor:
        """n of the output's shape, of every example by itself with mean zero and covariance U_i U_iᵀ."""

    @abstractmethod
    def squares(self, g: Tensor) -> Tensor:
        """‖U_iᵀ g_i‖² for g of the output's shape, (N,)."""

    def by_example(self, t: Tensor) -> Tensor:
        """``t`` of the output's shape, its first dimension in two: examples, and what each has of them."""
        return t.reshape(self.examples, self.shape[0] // self.examples, *self.shape[1:])


class Factors(UseForm):
    """y = c * p, p broadcast: biases, scales of normalisations.

    Args:
        factors: c, of the output's shape.
        aligned: the shape of p among the output's dimensions.
    """

    def __init__(self, output: torch.Size, examples: int, factors: Tensor, aligned: tuple[int, ...]) -> None:
        super().__init__(output, examples)
        self._factors, self._own = self.by_example(factors), (examples, 1, *aligned[1:])

    def noise(self, draw: Draw) -> Tensor:
        return (self._factors * draw(self._own)).reshape(self.shape)

    def squares(self, g: Tensor) -> Tensor:
        along = [d for d, n in enumerate(self._own) if n == 1 and d > 0]
        return (self._factors * self.by_example(g)).sum(along).square().reshape(self.examples, -1).sum(1)


class Lookups(UseForm):
    """y_r = p[k_r]: a table of which an example looks up some rows, perhaps one of them several times.

    Args:
        rows: k, of the output's shape without the last dimension.
        length: of the table.
    """

    def __init__(self, output: torch.Size, examples: int, rows: Tensor, length: int) -> None:
        super().__init__(output, examples)
        rows = rows.reshape(examples, -1)
        rows = rows + length * torch.arange(examples, device=rows.device)[:, None]
        found, self._where = torch.unique(rows, return_inverse=True)
        self._example = found // length

    def noise(self, draw: Draw) -> Tensor:
        return draw((len(self._example), self.shape[-1]))[self._where].reshape(self.shape)

    def squares(self, g: Tensor) -> Tensor:
        sums = g.new_zeros(len(self._example), self.shape[-1])
        sums.index_add_(0, self._where.reshape(-1), g.reshape(-1, self.shape[-1]))
        return g.new_zeros(self.examples).index_add_(0, self._example, sums.square().sum(1))


class Products(UseForm):
    """y = W x for every row x: linear layers, and convolutions with their patches as rows.

    Args:
        rows: (N, G, T, k), T rows of each example for each of G groups of channels, dimension 1 of the output.
    """

    def __init__(self, output: torch.Size, examples: int, rows: Tensor) -> None:
        super().__init__(output, examples)
        self._rows = _factor(rows)

    def noise(self, draw: Draw) -> Tensor:
        _, groups, _, count = self._rows.shape
        drawn = draw((self.examples, groups, count, self.shape[1] // groups))
        made = self._rows * drawn if self._rows.shape[2:] == (1, 1) else self._rows @ drawn
        return made.transpose(1, 2).reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)

    def squares(self, g: Tensor) -> Tensor:
        rows = g.movedim(1, -1).reshape(self.examples, -1, self._rows.shape[1], self.shape[1] // self._rows.shape[1])
        return (self._rows.mT @ rows.transpose(1, 2)).square().sum((1, 2, 3))


def _factor(rows: Tensor) -> Tensor:
    """F (..., T, m) with F Fᵀ = X Xᵀ for X (..., T, k), m at most T."""
    if rows.shape[-2] == 1:
        return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if rows.shape[-2] < rows.shape[-1]:
        return torch.linalg.qr(rows.mT, mode="r").R.mT
    return rows


def entrywise(change: Map, size: torch.Size) -> bool:
    """Whether a map between tensors of one size acts on each entry by itself."""
    sample = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = change(torch.ones(size))
    return factors.numel() == size.numel() and _same(factors * sample.to(factors), change(sample))


def form_of(change: Map, parameter: Window, output: torch.Size, looks_up: bool, examples: int) -> UseForm | None:
    """How a parameter comes to an output; None where that is not one of the known ways.

    Args:
        change: the linear map.
        looks_up: whether the operator is one that looks up rows of a table.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(parameter.size, generator=generator, dtype=torch.float64)
    for find in (_lookups,) if looks_up else (_factors, _products, _convolutions):
        form = find(change, parameter, output, examples, sample)
        if form is not None:
            return form
    return None


def _asked(change: Map, of: Tensor) -> Tensor | None:
    """What a map makes of something else than it was made for; None where it does not take that."""
    try:
        return change(of)
    except RuntimeError:  # sizes do not fit: the operator is of another kind
        return None


def _lookups(change: Map, p: Window, y: torch.Size, examples: int, sample: Tensor) -> UseForm | None:
    if len(p.size) != 2 or p.size[0] >= 1 / torch.finfo(p.dtype).eps:
        return None
    at = change(torch.arange(p.size[0], dtype=p.dtype).unsqueeze(1)).squeeze(-1).long()
    return Lookups(y, examples, at, p.size[0]) if _same(sample.to(at.device)[at], change(sample)) else None


def _factors(change: Map, p: Window, y: torch.Size, examples: int, sample: Tensor) -> UseForm | None:
    for aligned in _alignments(tuple(p.size), tuple(y)):
        factors = change(torch.ones(p.size)).expand(y)
        if _same(factors * sample.reshape(aligned).to(factors), change(sample).expand(y)):
            return Factors(y, examples, factors, aligned)
    return None


def _alignments(p: tuple[int, ...], y: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of a parameter among the dimensions of an output that it is the same for all examples of."""
    found = [(1,) * (len(y) - len(p)) + p] if len(p) <= len(y) else []
    if len(p) == 1 and len(y) > 2:
        found.append((1, *p, *(1,) * (len(y) - 2)))
    return [shape for shape in found if shape[:1] == (1,) and all(n in (1, m) for n, m in zip(shape, y, strict=True))]


def _products(change: Map, p: Window, y: torch.Size, examples: int, sample: Tensor) -> UseForm | None:
    if len(p.size) != 2 or len(y) != 2 or max(p.size[0], y[0]) * p.size[0] > _ROOM:
        return None
    rows = _asked(change, torch.eye(p.size[0]))
    if rows is None or rows.shape != (y[0], p.size[0]) or not _same(rows @ sample.to(rows), change(sample)):
        return None
    return Products(y, examples, rows.view(examples, 1, -1, p.size[0]))


def _convolutions(change: Map, p: Window, y: torch.Size, examples: int, sample: Tensor) -> UseForm | None:
    if len(p.size) < 3 or len(y) != len(p.size) or p.size[0] != y[1]:
        return None
    k, places = math.prod(p.size[1:]), math.prod(y) // max(y[1], 1)
    for groups in [g for g in range(1, p.size[0] + 1) if p.size[0] % g == 0]:
        if max(k, places) * k * groups > _ROOM:
            return None
        made = _asked(change, torch.eye(k).view(k, *p.size[1:]).repeat(groups, *[1] * (len(p.size) - 1)))
        if made is None or made.shape != (y[0], groups * k, *y[2:]):
            continue
        rows = made.view(y[0], groups, k, -1).mT  # of each patch
        weight = sample.view(groups, -1, k).mT.to(rows)
        if _same((rows @ weight).mT.reshape(y), change(sample)):
            return Products(y, examples, rows.view(examples, -1, *rows.shape[1:]).transpose(1, 2).flatten(2, 3))
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, in the dtype of the second."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    error, size = float((a - b).abs().max()), float(b.abs().max())
    return error <= 1e-3 * size + torch.finfo(torch.float32).tiny
