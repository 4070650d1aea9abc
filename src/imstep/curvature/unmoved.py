"""Whether parameters still hold what they held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.complexstep.tape import TapeChangedError
from imstep.curvature.parameters import ParameterVector, as_reals


class Unmoved:
    """Raises when called after the parameters have left the values they have now.

    Writes through ``.data`` leave no trace in a version counter, so what the parameters hold is copied if it is little,
    and else summed up: bit patterns read as integers, modulo 2⁶⁴, along the rows and along the columns of a table. Only
    a change that leaves all of these sums goes unnoticed.

    Source: our own; sums take two readings of the parameters and hardly any memory.
    """

    def __init__(self, parameters: ParameterVector) -> None:
        self._parameters = [p.detach() for p in parameters.memory]
        size = sum(p.nbytes for p in self._parameters)
        self._few = parameters.device.type == "cpu" and size <= _LITTLE
        self._then = [words.clone() for words in self._now()]

    def _now(self) -> list[Tensor]:
        return [_words(p) for p in self._parameters] if self._few else [sums_of_words(self._parameters)]

    def __call__(self) -> None:
        if not all(map(torch.equal, self._now(), self._then)):
            raise TapeChangedError(
                "a parameter was changed in place after the operator was built; the operator belongs to the old "
                "values. Build it anew at the new point."
            )


_LITTLE = 2**20
"""Bytes below which a copy costs less than the calls that sums take."""


def sums_of_words(tensors: Sequence[Tensor]) -> Tensor:
    """What tensors hold, summed up: see :class:`Unmoved`."""
    return torch.cat([sums for t in tensors for sums in _marginals(_words(t.detach()))])


_WIDTH = 256  # columns of a table of words


def _marginals(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows and over the columns of a table of words, and the words that fill no row."""
    table, rest = words.split([words.numel() // _WIDTH * _WIDTH, words.numel() % _WIDTH])
    table = table.view(-1, _WIDTH)
    return table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64), rest.to(torch.int64)


def _words(p: Tensor) -> Tensor:
    """The memory that the entries fill, as integers: as few and as wide as it can be read."""
    flat = as_reals(p).resolve_neg().reshape(-1)
    wide = 8 // flat.element_size()
    if flat.numel() % wide == 0 and flat.storage_offset() % wide == 0:
        return flat.view(torch.int64)
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
