"""Random signs, and sketches of rows by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SHORT = 128
"""Entries of a row up to which its products with signs cost no more than its Fourier transform."""
_AT_ONCE = 2**22
"""Entries that are transformed at a time: 32 MB."""


def random_signs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """1 or -1, of a shape, on the generator's device."""
    bits = torch.randint(2, tuple(shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(dtype)


def sketch(rows: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """B Ω, (N, width), for rows B (N, n) and a random Ω with E ΩΩᵀ = I.

    Few of the frequencies of rows whose signs have been changed at random; of short rows, products with random signs.

    Cost: 5/2 N L log₂ L operations, L the power of 2 that is no less than n and the width.

    Source: Woolfe, Liberty, Rokhlin and Tygert, Appl. Comput. Harmon. Anal. 25 (2008), p. 335.

    Example:
        >>> sketch(torch.ones(2, 1000, dtype=torch.float64), 300, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 300])
    """
    size = rows.shape[1]
    if size <= _SHORT:
        return rows @ random_signs((size, width), rows.dtype, generator) / width**0.5
    length = 1 << (max(size, width + 3) - 1).bit_length()
    signs = random_signs((size,), rows.dtype, generator)
    chosen = 1 + torch.randperm(length // 2 - 1, generator=generator, device=generator.device)[: (width + 1) // 2]
    found = [torch.fft.rfft(block * signs, n=length)[:, chosen] for block in rows.split(max(1, _AT_ONCE // length))]
    return torch.view_as_real(torch.cat(found)).flatten(1)[:, :width] * (2 / width) ** 0.5
