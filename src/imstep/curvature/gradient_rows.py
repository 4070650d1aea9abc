"""Per-residual gradients of one parameter, kept as small as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imstep.linalg.random_maps import random_signs, sketch

_TILE = 2**16
"""Entries of a Gram matrix at a time: half a megabyte."""


@dataclass(frozen=True)
class Form:
    """How the rows of a parameter are sent: each as ``terms`` outer products, or where that is 0 as its entries.

    Attributes:
        left, right: entries of the two factors of a product; of a row, and 0.
    """

    terms: int
    left: int
    right: int = 0

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return max(self.terms, 1) * (self.left + self.right)

    @classmethod
    def common(cls, forms: Sequence[Form | None], entries: int) -> Form | None:
        """One that rows of all these forms can be sent in, None being that of zeros."""
        found = [form for form in forms if form is not None]
        if not found:
            return None
        longest = max(found, key=lambda form: form.terms)
        if all(form.terms and (form.left, form.right) == (longest.left, longest.right) for form in found):
            return longest
        return cls(0, entries)

    def unpacked(self, packed: Tensor) -> GradientRows:
        """The rows from what is sent, (N, width)."""
        if not self.terms:
            return PlainRows(packed)
        both = packed.view(len(packed), self.terms, self.left + self.right).movedim(1, 0)
        return OuterRows(both[..., : self.left].contiguous(), both[..., self.left :].contiguous())


class GradientRows(ABC):
    """The gradients of N residuals with respect to one parameter: the rows of a matrix B, (N, entries)."""

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """B v, (N,)."""

    @abstractmethod
    def rmatvec(self, vector: Tensor) -> Tensor:
        """Bᵀ u, (entries,)."""

    @abstractmethod
    def add_gram(self, out: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> None:
        """Add the block (B Bᵀ)[rows, columns] to ``out``."""

    @cached_property
    @abstractmethod
    def squared_norms(self) -> Tensor:
        """The diagonal of B Bᵀ, (N,)."""

    @abstractmethod
    def select(self, index: Tensor) -> GradientRows:
        """The rows at ``index`` (k,)."""

    @abstractmethod
    def over(self, divisor: float | Tensor) -> GradientRows:
        """B / divisor; of a tensor, (N, 1), an entry for each row."""

    @abstractmethod
    def written_out(self) -> Tensor:
        """B itself, (N, entries)."""

    def sketched(self, width: int, generator: torch.Generator) -> Tensor:
        """B Ω, (N, width), for a random Ω with E ΩΩᵀ = I."""
        return sketch(self.written_out(), width, generator)

    @property
    @abstractmethod
    def multiplications(self) -> tuple[int, int]:
        """For an entry of B v, and for an entry of B Bᵀ."""

    @property
    @abstractmethod
    def form(self) -> Form:
        """In which they are sent with the fewest numbers."""

    def packed(self, form: Form) -> Tensor:
        """What is sent, (N, width)."""
        return self.written_out()


class PlainRows(GradientRows):
    """Stored as they are, (N, entries)."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def matvec(self, vector: Tensor) -> Tensor:
        return self._rows @ vector

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._rows.mT @ vector

    def add_gram(self, out: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> None:
        out.addmm_(self._rows[rows], self._rows[columns].mT)

    @cached_property
    def squared_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self._rows, dim=1).square()  # without the memory of the squares

    def select(self, index: Tensor) -> GradientRows:
        return PlainRows(self._rows[index])

    def over(self, divisor: float | Tensor) -> GradientRows:
        return PlainRows(self._rows / divisor)

    def written_out(self) -> Tensor:
        return self._rows

    @property
    def multiplications(self) -> tuple[int, int]:
        return self._rows.shape[1], self._rows.shape[1]

    @property
    def form(self) -> Form:
        return Form(0, self._rows.shape[1])


class OuterRows(GradientRows):
    """Sums of m outer products: row i is Σ_s left_si right_siᵀ.

        (B Bᵀ)_ij = Σ_st (left_si · left_tj) (right_si · right_tj)

    Args:
        left: (m, N, out); zeros where a residual has fewer than m.
        right: (m, N, in).

    Source: our own; the diagonal for one product a residual is in Goodfellow, "Efficient per-example gradient
        computations" (arXiv 1510.01799).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def matvec(self, vector: Tensor) -> Tensor:
        matrix = vector.view(self._left.shape[2], self._right.shape[2])
        return (self._left @ matrix).mul_(self._right).sum((0, 2))

    def rmatvec(self, vector: Tensor) -> Tensor:
        weighted = (self._left * vector[:, None]).flatten(0, 1)
        return (weighted.mT @ self._right.flatten(0, 1)).reshape(-1)

    def add_gram(self, out: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> None:
        left, right, other_left, other_right = (
            factor[:, at] for at in (rows, columns) for factor in (self._left, self._right)
        )
        for i, j in _tiles(out):
            for a, b in zip(left[:, i], right[:, i], strict=True):
                for c, d in zip(other_left[:, j], other_right[:, j], strict=True):
                    out[i, j].addcmul_(a @ c.mT, b @ d.mT)

    @cached_property
    def squared_norms(self) -> Tensor:
        norms = torch.zeros(self._left.shape[1], dtype=self._left.dtype, device=self._left.device)
        for s, (left, right) in enumerate(zip(self._left, self._right, strict=True)):
            norms += left.square().sum(1) * right.square().sum(1)
            for other_left, other_right in zip(self._left[:s], self._right[:s], strict=True):
                norms += 2 * (left * other_left).sum(1) * (right * other_right).sum(1)
        return norms

    def select(self, index: Tensor) -> GradientRows:
        return OuterRows(self._left[:, index], self._right[:, index])

    def over(self, divisor: float | Tensor) -> GradientRows:
        return OuterRows(self._left / divisor, self._right)

    def written_out(self) -> Tensor:
        return sum_of_products(self._left, self._right)

    def sketched(self, width: int, generator: torch.Generator) -> Tensor:
        """By products Ω_oi,j = A_oj B_ij / √width of signs: Σ_s (left_s A) * (right_s B) / √width."""
        shape, dtype = (self._left.shape[1], width), self._left.dtype
        by_left, by_right = (random_signs((f.shape[2], width), dtype, generator) for f in (self._left, self._right))
        image = torch.zeros(shape, dtype=dtype, device=self._left.device)
        for left, right in zip(self._left, self._right, strict=True):
            image.addcmul_(left @ by_left, right @ by_right)
        return image / width**0.5

    @property
    def multiplications(self) -> tuple[int, int]:
        (m, _, out), width = self._left.shape, self._right.shape[2]
        return m * out * width, m * m * (out + width)

    @property
    def form(self) -> Form:
        return Form(len(self._left), self._left.shape[2], self._right.shape[2])

    def packed(self, form: Form) -> Tensor:
        if not form.terms:
            return self.written_out()
        both = torch.cat([self._left, self._right], 2)
        more = both.new_zeros(form.terms - len(both), *both.shape[1:])
        return torch.cat([both, more]).movedim(0, 1).flatten(1)


class StackedRows(GradientRows):
    """Rows of a parameter in slices, each kept by itself.

    Args:
        slices: the rows of each.
        entries: of one.
    """

    def __init__(self, slices: Sequence[GradientRows], entries: int) -> None:
        self._slices, self._entries = list(slices), entries

    def matvec(self, vector: Tensor) -> Tensor:
        pairs = zip(self._slices, vector.split(self._entries), strict=True)
        return torch.stack([part.matvec(v) for part, v in pairs]).sum(0)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return torch.cat([part.rmatvec(vector) for part in self._slices])

    def add_gram(self, out: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> None:
        for part in self._slices:
            part.add_gram(out, rows, columns)

    @cached_property
    def squared_norms(self) -> Tensor:
        return torch.stack([part.squared_norms for part in self._slices]).sum(0)

    def select(self, index: Tensor) -> GradientRows:
        return StackedRows([part.select(index) for part in self._slices], self._entries)

    def over(self, divisor: float | Tensor) -> GradientRows:
        return StackedRows([part.over(divisor) for part in self._slices], self._entries)

    def written_out(self) -> Tensor:
        return torch.cat([part.written_out() for part in self._slices], 1)

    def sketched(self, width: int, generator: torch.Generator) -> Tensor:
        return torch.stack([part.sketched(width, generator) for part in self._slices]).sum(0)

    @property
    def multiplications(self) -> tuple[int, int]:
        counts = [part.multiplications for part in self._slices]
        return sum(image for image, _ in counts), sum(entry for _, entry in counts)

    @property
    def form(self) -> Form:
        return Form(0, self._entries * len(self._slices))


def _tiles(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a matrix, part by part, such that a few of such size stay in a processor's cache."""
    count, width = matrix.shape
    length = max(1, _TILE // max(1, min(count, width))) if matrix.device.type == "cpu" else max(count, width, 1)
    for start in range(0, max(count, width), length):
        part, whole = slice(start, start + length), slice(None)
        yield (part, whole) if count >= width else (whole, part)


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ_s left_si right_siᵀ as rows, (N, out · in)."""
    if 1 in (left.shape[2], right.shape[2]):
        return (left * right).sum(0)
    return torch.einsum("mno,mni->noi", left, right).flatten(1)
