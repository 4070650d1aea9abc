"""How the eigenvalues of a matrix are spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.spectral.groups import per_group
from imstep.spectral.probes import NORMAL, generator_of
from imstep.spectral.quadrature import Rule, averaged, gauss, quadrature
from imstep.uncompiled import uncompiled

_REACH = 5.0
"""Widths beyond the extreme eigenvalues that the grid goes: less than 1e-5 of a peak is left there."""

_EVERY = 5
"""Steps from one judgement of a density to the next."""

_LITTLE = 0.5
"""Of the band: where so many steps changed a density by less, what is left is about that at most."""

_LOOKED_AT, _FAINT = 512, 1e-3
"""Points of the grid on which changes are judged, and how much of its widest place the band has there at least."""


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


@uncompiled
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
        steps: of the Lanczos process of each probe, at most: they end together where the last five changed no value
            by more than half of the band.
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

    Cost: up to ``steps * probes`` products in blocks of ``probes``, or n; 4 ``probes`` vectors.

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), 1075-1099; of networks, Ghorbani, Krishnan and
    Xiao, ICML 2019 (arXiv 1901.10159). The default width is our own: a normal distribution of standard deviation s
    times half the range has Chebyshev coefficients like exp(-s² j² / 2), and the quadrature is exact up to j = 2 steps.
    It is Spalević's generalised averaged Gaussian quadrature (Math. Comp. 76 (2007), 1483-1492) of each probe's
    process, some ten times nearer than Gauss's for no product more. The end is our own, too: in
    trials what further steps changed was about what the last five had, at most.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> found = density(DiagonalOperator(torch.cat([torch.zeros(90), torch.ones(10)])))
        >>> below = found.grid < 0.5
        >>> round(float(torch.trapezoid(found.values[below], found.grid[below])), 3)
        0.9
    """
    if points < 2 or (width is not None and not 0 < width < math.inf):
        raise ValueError(f"points is at least 2 and width positive, got {points} and {width}.")
    settling = _Settling(operator.size, probes, steps, width)
    spectrum = quadrature(operator, steps, probes, generator_of(seed, generator), settling)
    if not spectrum.finite:
        nothing = torch.full((points,), math.nan, dtype=torch.float64)
        return SpectralDensity(nothing, nothing, torch.full_like(nothing, math.inf), math.nan, spectrum.products)
    rules = spectrum.rules()
    smoothing = _Smoothing.over(rules, steps, width, points)
    values, error = spectrum.mean(smoothing, by=averaged)
    if spectrum.values is None:
        # The weights of a single eigenvalue are so skewed that a few of them tell too little of their spread.
        band = smoothing.band(rules, operator.size, probes)
        error = torch.maximum(error, band) + settling.left * band
    return SpectralDensity(smoothing.grid, values, error, smoothing.width, spectrum.products)


@dataclass(frozen=True, eq=False)
class _Smoothing:
    """Normal distributions of a width about nodes, on a grid, (points,)."""

    grid: Tensor
    width: float

    @classmethod
    def over(cls, rules: Sequence[Rule], steps: int, width: float | None, points: int) -> _Smoothing:
        """The grid for all nodes, and the width for so many steps, if none is given."""
        nodes = torch.cat([nodes for nodes, _ in rules])
        least, largest = float(nodes.min()), float(nodes.max())
        if width is None:
            # A multiple of the identity has no range, and its eigenvalues a range of rounding only.
            size = max(abs(least), abs(largest)) or 1.0
            width = max((largest - least) / steps, 1e-3 * size / steps)
        ends = least - _REACH * width, largest + _REACH * width
        return cls(torch.linspace(*ends, points, dtype=torch.float64), width)

    def __call__(self, nodes: Tensor) -> Tensor:
        """(points, k) for nodes (k,)."""
        height = 1 / (self.width * math.sqrt(2 * math.pi))
        return height * torch.exp(-(((self.grid[:, None] - nodes) / self.width) ** 2) / 2)

    def mean(self, rules: Sequence[Rule], power: int = 1) -> Tensor:
        """The mean over rules of a power of the distributions, (points,)."""
        return torch.stack([self(nodes) ** power @ weights for nodes, weights in rules]).mean(0)

    def band(self, rules: Sequence[Rule], size: int, probes: int) -> Tensor:
        """What so many probes leave open, (points,): random signs v spread vᵀf(A)v by 2 tr f(A)² in variance, where
        eigenvectors are not those of the coordinates.
        """
        return NORMAL * (2 * self.mean(rules, power=2) / (size * probes)).sqrt()


class _Settling:
    """Whether further steps would change a density by little of its band.

    Attributes:
        left: by how much of the band, where it ended for that.
    """

    def __init__(self, size: int, probes: int, steps: int, width: float | None) -> None:
        self.left = 0.0
        self._size, self._probes, self._steps, self._width = size, probes, steps, width

    def __call__(self, processes: list[Tensor]) -> bool:
        step = max(map(len, processes))
        if step % _EVERY or step <= 2 * _EVERY or not all(bool(torch.isfinite(T).all()) for T in processes):
            return False
        rules = [gauss(T) for T in processes]
        smoothing = _Smoothing.over(rules, self._steps, self._width, _LOOKED_AT)
        band = smoothing.band(rules, self._size, self._probes)
        before, now = (smoothing.mean([averaged(T[:k, : k + 1]) for T in processes]) for k in (step - _EVERY, step))
        left = float(((now - before).abs() / band.clamp(min=_FAINT * float(band.max()))).max())
        if not left <= _LITTLE:
            return False
        self.left = max(self.left, left)
        return True
