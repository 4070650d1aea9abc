"""Extreme eigenvalues with their vectors, each with its residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.symmetry import symmetric_part
from imstep.spectral.groups import per_group
from imstep.spectral.krylov import F64, KrylovSpace, certified
from imstep.spectral.probes import generator_of, images, no_rows
from imstep.spectral.units import InUnits
from imstep.uncompiled import uncompiled

_KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "LM": lambda values: values.abs(),
    "LA": lambda values: values,
    "SA": lambda values: -values,
}

_REMEDIES = {
    "SM": " For eigenvalues next to zero take those of A.inverse(damping).",
    "BE": " For both ends ask for 'LA' and for 'SA'.",
}

_ROOM = 2**31
"""Bytes that the basis may fill, unless so few vectors would not do."""

_INNER = 0.3
"""Part of the tolerance that recurrences must reach; rounding and what is left out when a search begins anew may have
the rest."""

_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Residuals, relative to the largest eigenvalue, that rounding of products may leave."""

_WHOLE = 1024
"""Rows of a matrix that is decomposed where as many products have not been enough."""

_FEWEST = 5
"""Steps from a random vector before anything can be said."""

_AGAIN = 20
"""Vectors that there is to be room for when a search begins anew."""

_KNOWN = 0.1
"""Times the distance from the last wanted value: up to this residual a further Ritz vector is known well enough."""

_UNSEEN = 0.03
"""Times 1/√n: a smaller part of a random vector may escape. A part is as small in less than 2.4 % of cases."""

_APART = 0.01
"""Part of the range of eigenvalues: a pair that was missed and stands out by less may stay so."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs (θ, y) of A, ‖y‖ = 1, the most wanted first.

    Attributes:
        values: θ, (k,), float64 on the CPU; nan where products were not finite.
        vectors: y, orthonormal columns (n, k).
        residual_norms: ‖A y - θ y‖, (k,), computed from y by a product: an eigenvalue of A lies within this of θ.
        products: products with A that were spent.
        converged: whether all residuals meet the tolerance, and no wanted eigenvalue was seen to be missing.
        state: to go on from where the products ran out; None where they have not.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    products: int
    converged: bool
    state: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class EigenProgress:
    """How far a search is.

    Attributes:
        products: spent so far.
        converged: how many of the wanted pairs meet the tolerance.
        values: the best approximations so far, at most k, the most wanted first.
        residual_norms: of these, from the recurrence.
    """

    products: int
    converged: int
    values: Tensor
    residual_norms: Tensor


_Found = TypeVar("_Found", Eigenpairs, EigenProgress)


@uncompiled
@per_group
def eigenpairs(
    operator: LinearOperator,
    k: int = 10,
    which: str = "LM",
    tol: float = 1e-6,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int | None = None,
    progress: Callable[[EigenProgress], None] | None = None,
    resume: dict[str, Any] | None = None,
    by: str | None = None,
) -> Eigenpairs:
    """The k largest or smallest eigenvalues of A with their vectors, by a restarted Lanczos method.

        ‖A y - θ y‖ <= tol · max |θ|,   the largest magnitude of all θ seen, which is ‖A‖ or a little less

    Once k pairs are found, the search begins anew from a random vector orthogonal to all that it knows well, until
    nothing more wanted turns up: so eigenvalues that are repeated come as often as they occur, unless they are within
    1 % of the range of the last one.

    Args:
        operator: A, self-adjoint, of size n.
        k: how many, in [1, n].
        which: "LM" for the largest magnitudes, "LA" for the largest, "SA" for the smallest.
        tol: in [0, 1); at least what rounding leaves, 1e-6 in float32 and 1e-14 in float64, counts.
        seed: of the start vector; or pass a ``generator``.
        max_products: ends there, unconverged; at least 3 k. Default 1000 + 100 k.
        progress: called after each product.
        resume: ``state`` of an earlier result with the same operator and arguments; the result is the same as without
            the interruption. It can be kept by ``torch.save``.
        by: "layer" or "parameter" for the pairs of the diagonal blocks of an operator over a model, a dictionary;
            all pairs of a block that is smaller than k.

    Returns:
        :class:`Eigenpairs`. Outcomes are values: not converged, or not finite.

    Raises:
        ValueError: an argument out of range; A is not symmetric, as far as its products show it.

    Cost: some ten products for each well separated pair, more where eigenvalues crowd; one to two dozen to see that
    none is missed, for each copy of the most frequent eigenvalue; k for the residuals, and k more where rounding has to
    be taken out of them. n products where that is not more, and n more where n <= 1024 products have not been enough.
    max(50, 5 k) + 2 vectors, fewer where they would fill 2 GiB, but at least 2 k + 10.

    Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), 602-616. To look again from a random vector is our own
    choice, and so is the bound on what it can have missed, in the manner of Kuczynski and Wozniakowski, SIAM J. Matrix
    Anal. Appl. 13 (1992), but from the steps that were made.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> found = eigenpairs(DiagonalOperator(torch.tensor([1.0, -5.0, 3.0])), k=2)
        >>> found.values, found.converged
        (tensor([-5.,  3.], dtype=torch.float64), True)
    """
    scaled, told = InUnits(operator), progress
    scaled.unit = 0.0 if resume is None else resume.get("unit", 1.0)
    if progress is not None:
        told = lambda at: progress(_times(at, scaled.unit))
    k = _whole_number(k) if by is None else min(_whole_number(k), operator.size)
    _check(operator.size, k, which, tol)
    found = _pairs(scaled, k, which, tol, generator_of(seed, generator), max_products, told, resume)
    state = None if found.state is None else {**found.state, "unit": scaled.unit}
    return _times(replace(found, state=state), scaled.unit)


def _times(found: _Found, unit: float) -> _Found:
    """Of A what was found of A / unit."""
    if unit == 1:
        return found
    return replace(found, values=unit * found.values, residual_norms=unit * found.residual_norms)


def _pairs(
    operator: LinearOperator,
    k: int,
    which: str,
    tol: float,
    generator: torch.Generator,
    max_products: int | None,
    progress: Callable[[EigenProgress], None] | None,
    resume: dict[str, Any] | None,
) -> Eigenpairs:
    """What :func:`eigenpairs` returns."""
    size = operator.size
    tol = max(tol, _ROUNDING.get(operator.dtype, 8 * torch.finfo(operator.dtype).eps))
    capacity = max(2 * k + 8, min(max(50, 5 * k), _ROOM // max(1, size * operator.dtype.itemsize) - 1))
    if size <= 2 * capacity:
        return _by_all_products(operator, k, which, tol)
    limit = 1000 + 100 * k if max_products is None else max_products
    if limit < 3 * k:
        raise ValueError(f"max_products is at least 3 k = {3 * k}, got {limit}.")
    search = _Search(KrylovSpace(operator, capacity, generator), k, which, tol, progress)
    if resume is not None:
        search.load_state_dict(resume)
    # A small matrix is decomposed rather than searched for long, if the products that are left suffice for it.
    patience = min(size, limit - size) if size <= _WHOLE and 2 * limit >= 3 * size else limit - k
    found = search.run(patience)
    if patience < limit - k and not (found or search.space.broken):
        whole = _by_all_products(operator, k, which, tol)
        return replace(whole, products=search.space.products + whole.products)
    state = None if found or search.space.broken else search.state_dict()
    return _certified(operator, search, found, state)


class _Search:
    """The search for the k most wanted pairs in a Krylov space."""

    def __init__(
        self, space: KrylovSpace, k: int, which: str, tol: float, progress: Callable[[EigenProgress], None] | None
    ) -> None:
        self.space, self.k, self.tol, self._progress = space, k, tol, progress
        self.key, self._which = _KEYS[which], which
        self._worst: float | None = None  # key of the last pair, while the search looks for what it missed
        self._since = 0

    def run(self, limit: int) -> bool:
        """Spend up to ``limit`` products; whether all pairs are found."""
        while self.space.products < limit:
            if self.space.full:
                self._restart()
            self.space.expand()
            if self.space.broken:
                return False
            if self._step():
                return True
        return False

    @property
    def _level(self) -> float:
        """What residuals by the recurrence must reach."""
        return _INNER * self.tol * self.space.scale

    def wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, coordinates and residual norms of all Ritz pairs, the most wanted first."""
        values, coordinates, residuals = self.space.ritz()
        order = self.key(values).argsort(descending=True, stable=True)
        return values[order], coordinates[:, order], residuals[order]

    def state_dict(self) -> dict[str, Any]:
        return {"space": self.space.state_dict(), "worst": self._worst, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.space.load_state_dict(state["space"])
        self._worst, self._since = state["worst"], state["since"]

    def _step(self) -> bool:
        """What the last product has shown; whether the search is over."""
        values, coordinates, residuals = self.wanted()
        level = self._level
        converged = int((residuals[: self.k] <= level).sum())
        if self._progress is not None:
            self._progress(EigenProgress(self.space.products, converged, values[: self.k], residuals[: self.k]))
        if len(values) < self.k:
            return False
        keys = self.key(values)
        self._since += 1
        if self._worst is not None:
            values_since, along, length = self.space.tail(self._since)
            keys_since = self.key(values_since)
            if float(keys_since.max()) <= self._worst + level:
                enough = self._since >= _FEWEST and self._nothing_missed(values_since, length, self._worst)
                return self.space.full or enough
            # A pair was missed: the search goes on from the Ritz vector that it has a large part in.
            self._worst = None
            self.space.go_on_from(along[:, keys_since.argmax()], self.k)
        elif converged == self.k:
            self._worst, self._since = float(keys[self.k - 1]), 0
            self._look_again(keys, values, coordinates, residuals)
        return False

    def _look_again(self, keys: Tensor, values: Tensor, coordinates: Tensor, residuals: Tensor) -> None:
        """Begin with a random vector, beside all that is known: that leaves little to search through.

        Of a missed eigenvector at most r / (its distance from θ) lies along a Ritz vector of value θ and residual norm
        r. Vectors known less well might have most of it, and hide it.
        """
        known = residuals <= _KNOWN * (keys[self.k - 1] - keys)
        known[: self.k], known[self.space.capacity - _AGAIN :] = True, False
        self.space.restart(values[known], coordinates[:, known])
        self.space.begin_anew()

    def _nothing_missed(self, values: Tensor, length: float, worst: float) -> bool:
        """Whether the steps since would have shown a missed pair, were it as wanted as the last one.

        They have made a polynomial p, monic with the Ritz values as zeros, of A at the random unit vector w, and found
        ‖p(A) w‖ = Π β. An eigenvector of which w has a part c contributes |c p(θ)|, so that |c| <= Π β / |p(θ)|; and
        |c| < δ/√n has a probability below 0.8 δ.
        """
        if length == -math.inf:
            return True
        others, both = float(self.key(values).max()), self._which == "LM"
        spread = 2 * others if both else float(values[-1] - values[0])
        at = max(worst, others + _APART * spread)
        places = {"LM": (at, -at), "LA": (at,), "SA": (-at,)}[self._which]
        magnified = min(float((place - values).abs().log().sum()) for place in places)
        return length - magnified < math.log(_UNSEEN / self.space.dimension**0.5)

    def _restart(self) -> None:
        values, coordinates, _ = self.wanted()
        kept = self.k + (len(values) - self.k) // 2
        self.space.restart(values[:kept], coordinates[:, :kept])


def _certified(operator: LinearOperator, search: _Search, found: bool, state: dict[str, Any] | None) -> Eigenpairs:
    space, k = search.space, search.k
    if space.size < k:
        return _nowhere(operator, k, space.products, state)
    # Pairs that are found come first in the basis; a Ritz vector might mix the last one with another of its eigenvalue.
    coordinates = torch.eye(space.size, dtype=F64) if found else search.wanted()[1]
    aim = search.tol * space.scale if found else math.inf
    pairs, residuals, spent = certified(operator, space.vectors(coordinates[:, :k]), search.key, aim)
    good = found and bool((residuals <= search.tol * space.scale).all())
    return Eigenpairs(pairs.values, pairs.vectors.mT, residuals, space.products + spent, good, state)


def _nowhere(operator: LinearOperator, k: int, products: int, state: dict[str, Any] | None = None) -> Eigenpairs:
    """What is said where products are not finite."""
    values, vectors = torch.full((k,), torch.nan, dtype=F64), no_rows(operator).new_empty(k, operator.size)
    return Eigenpairs(values, vectors.fill_(torch.nan).mT, torch.full_like(values, torch.inf), products, False, state)


def _by_all_products(operator: LinearOperator, k: int, which: str, tol: float) -> Eigenpairs:
    """From the matrix itself."""
    size = operator.size
    matrix = images(operator, torch.eye(size, dtype=operator.dtype, device=operator.device)).to(F64).cpu()
    if not bool(torch.isfinite(matrix).all()):
        return _nowhere(operator, k, size)
    values, vectors = torch.linalg.eigh(symmetric_part(matrix, operator.dtype))
    order = _KEYS[which](values).argsort(descending=True, stable=True)[:k]
    largest = float(values.abs().max())
    values, rounded = values[order], vectors[:, order].to(operator.dtype)
    residuals = (matrix @ rounded.to(F64) - rounded.to(F64) * values).norm(dim=0)
    good = bool((residuals <= tol * largest).all())
    return Eigenpairs(values, operator.held(rounded.to(operator.device).mT).mT, residuals, size, good)


def _whole_number(k: Any) -> int:
    """k, if it is a whole number."""
    try:
        return index(k)
    except TypeError:
        raise TypeError(f"k, the number of eigenpairs, is a whole number, got {k!r}.") from None


def _check(size: int, k: int, which: str, tol: float) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"k, the number of eigenpairs, lies between 1 and the size {size} of the operator, got {k}.")
    if which not in _KEYS:
        raise ValueError(
            f"which is one of 'LM' (largest magnitude), 'LA' (largest) and 'SA' (smallest), got {which!r}."
            + _REMEDIES.get(which, "")
        )
    if not 0 <= tol < 1:
        raise ValueError(f"tol, a residual relative to the largest eigenvalue, lies in [0, 1), got {tol}.")
