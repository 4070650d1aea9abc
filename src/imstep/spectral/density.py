"""How the eigenvalues of a matrix are spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.spectral.groups import per_group
from imstep.spectral.probes import NORMAL, generator_of
from imstep.spectral.quadrature import quadrature

_REACH = 5.0
"""Widths beyond the extreme eigenvalues that the grid goes: less than 1e-5 of a peak is left there."""


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of eigenvalues, smoothed by a normal distribution of the given width.

    Attributes:
        grid: where it is given, (points,), float64 on the CPU.
        values: the density there, (points,); its integral is 1.
        error: of each value, (points,): the density of A, so smoothed, lies within this of it, with probability 95 %.
        width: standard deviation of the smoothing.
        products: products with A that were spent.
    """

    grid: Tensor
    values: Tensor
    error: Tensor
    width: float
    products: int


@per_group
def density(
    operator: LinearOperator,
    steps: int = 100,
    probes: int = 10,
    *,
    width: float | None = None,
    points: int = 1024,
    seed: int = 0,
    generator: torch.Generator | None = None,
    by: str | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of A by stochastic Lanczos quadrature.

        φ(x) = 1/n Σᵢ N(x; λᵢ, width²)  ≈  mean over probes of Σ ω N(x; θ, width²)

    Args:
        operator: A, self-adjoint, of size n.
        steps: of the Lanczos process of each probe.
        probes: random vectors of signs; at least 2 for an error.
        width: of the smoothing. Default: the range of the eigenvalues divided by ``steps``, about the least that so
            many steps resolve; from there on the error is that of the probes.
        points: of the grid, >= 2.
        seed: of the probes; or pass a ``generator``.
        by: "layer" or "parameter" for the densities of the diagonal blocks of an operator over a model, a dictionary.

    Returns:
        A :class:`SpectralDensity`; exact, with no error, where all n products cost no more. Its values are nan if a
        product was not finite.

    Raises:
        ValueError: an argument out of range; A is not symmetric, as far as its products show it.

    Cost: ``steps * probes`` products in blocks of ``probes``, or n; 4 ``probes`` vectors.

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), 1075-1099; of networks, Ghorbani, Krishnan and
    Xiao, ICML 2019 (arXiv 1901.10159). The default width is our own: a normal distribution of standard deviation s
    times half the range has Chebyshev coefficients like exp(-s² j² / 2), and the quadrature is exact up to j = 2 steps.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> found = density(DiagonalOperator(torch.cat([torch.zeros(90), torch.ones(10)])))
        >>> below = found.grid < 0.5
        >>> round(float(torch.trapezoid(found.values[below], found.grid[below])), 3)
        0.9
    """
    if points < 2 or (width is not None and not 0 < width < math.inf):
        raise ValueError(f"points is at least 2 and width positive, got {points} and {width}.")
    spectrum = quadrature(operator, steps, probes, generator_of(seed, generator))
    if not spectrum.finite:
        nothing = torch.full((points,), math.nan, dtype=torch.float64)
        return SpectralDensity(nothing, nothing, torch.full_like(nothing, math.inf), math.nan, spectrum.products)
    nodes = torch.cat([nodes for nodes, _ in spectrum.rules()])
    least, largest = float(nodes.min()), float(nodes.max())
    if width is None:
        # A multiple of the identity has no range, and its eigenvalues a range of rounding only.
        size = max(abs(least), abs(largest)) or 1.0
        width = max((largest - least) / steps, 1e-3 * size / steps)
    grid = torch.linspace(least - _REACH * width, largest + _REACH * width, points, dtype=torch.float64)
    height = 1 / (width * math.sqrt(2 * math.pi))
    kernel = lambda at: height * torch.exp(-(((grid[:, None] - at) / width) ** 2) / 2)
    values, error = spectrum.mean(kernel)
    if spectrum.values is None:
        # The weights of a single eigenvalue are so skewed that a few of them tell too little of their spread; random
        # signs v spread vᵀf(A)v by 2 tr f(A)² in variance, where eigenvectors are not those of the coordinates.
        squares, _ = spectrum.mean(lambda at: kernel(at) ** 2)
        error = torch.maximum(error, NORMAL * (2 * squares / (operator.size * probes)).sqrt())
    return SpectralDensity(grid, values, error, width, spectrum.products)
