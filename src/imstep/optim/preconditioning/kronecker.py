"""Preconditioning by Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from imstep.curvature.kronecker import KroneckerFactors
from imstep.curvature.kronecker_blocks import EigenbasisMoments, FactoredDamping, LayerInverses, TikhonovDamping
from imstep.curvature.layers import LayerObserver
from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost

YOUNG = 10
"""Averages are young for this many times ``every`` steps. Our choice: small problems take no more steps than that."""


@dataclass(frozen=True)
class Kronecker(Preconditioning):
    """Kronecker factors of linear, recurrent and convolutional layers, a diagonal for the rest.

    Where the loss has no convex end, or the model no such layer, the iterations stay plain.

    Args:
        every: steps between two refreshes of the factors, >= 1. While averages are young they are refreshed more often:
            every second step at first, then after a tenth more steps than were taken.
        decay: weight of the past in the running averages, in [0, 1).
        seed: of the sampled targets; they do not touch the global random state.
        largest: widest input or output of a layer that gets factors, >= 1; they take the square of it in memory and
            the cube in time. Wider layers, such as a large vocabulary's, get a diagonal.
        damping: how λ enters: :class:`FactoredDamping`, a share for each factor, or :class:`TikhonovDamping`, the
            identity added to their product, for an eigenvalue problem of each factor in place of an inverse.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), sections 3 to 6; for convolutions Grosse and Martens,
        ICML 2016 (arXiv 1602.01407); the numbers are our choice.
    """

    every: int = 2
    decay: float = 0.8
    seed: int = 0
    largest: int = 4096
    damping: LayerInverses = field(default_factory=FactoredDamping)

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.damping, (FactoredDamping, TikhonovDamping)):
            raise TypeError(f"damping must be FactoredDamping() or TikhonovDamping(), got {self.damping!r}.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _KroneckerPreconditioner(self, parameters, self.damping)


@dataclass(frozen=True)
class KroneckerEigenbasis(Preconditioning):
    """E-KFAC: the eigenvectors of Kronecker factors, and in them second moments of gradients; else as `Kronecker`.

        P: W -> G ((GᵀW A) / (s + λ)) Aᵀ,   s = Σ E[(Gᵀ D A)²],   D the gradient of one case with a sampled target

    A and G are the eigenvectors of a layer's factors. In Frobenius norm the matrix is nearer to Gauss-Newton than that
    of K-FAC, of which s is the product of the factors' eigenvalues. λ is added to it as it is.

    Args:
        every, decay, seed, largest: as for :class:`Kronecker`; the moments are refreshed and averaged as factors are.
        basis_every: refreshes between two decompositions of the factors, >= 1.

    Cost: a backward pass a refresh, and the layers' inputs and their outputs' gradients are kept during it, those of
        all pieces of a batch together. in³ + out³ operations a layer for a decomposition; a step's inverse is made at
        any λ without one.

    Source: George, Laurent, Bouthillier, Ballas and Vincent, NeurIPS 2018 (arXiv 1806.03884), Algorithm 1, with running
        means (their EKFAC-ra) and sampled targets; the numbers are our choice.
    """

    every: int = 2
    decay: float = 0.8
    seed: int = 0
    largest: int = 4096
    basis_every: int = 5

    def __post_init__(self) -> None:
        _check(self)
        if self.basis_every < 1:
            raise ValueError(f"basis_every, a number of refreshes, is at least 1, got {self.basis_every}.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _KroneckerPreconditioner(self, parameters, EigenbasisMoments(self.basis_every))


def _check(kind: Kronecker | KroneckerEigenbasis) -> None:
    if kind.largest < 1:
        raise ValueError(f"largest, the widest layer with factors, is at least 1, got {kind.largest}.")
    if kind.every < 1:
        raise ValueError(f"every, the steps between two refreshes, is at least 1, got {kind.every}.")
    if not 0 <= kind.decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {kind.decay}.")


class _KroneckerPreconditioner(Preconditioner):
    def __init__(
        self, kind: Kronecker | KroneckerEigenbasis, parameters: ParameterVector, inverses: LayerInverses
    ) -> None:
        self._kind, self._parameters, self._inverses = kind, parameters, inverses
        self._factors = KroneckerFactors(parameters, kind.decay, inverses)
        self._generator = torch.Generator(device=parameters.device).manual_seed(kind.seed)
        self._steps = self._due = 0
        self._decay: tuple[float, ...] | None = None  # of each parameter
        self._inverse: LinearOperator | None = None
        self._inverse_damping = 0.0  # 0: out of date
        self._inverse_decay: tuple[float, ...] | None = None

    def observer(self) -> LayerObserver | None:
        due = self._steps >= self._due
        if due:
            self._due = self._steps + min(self._kind.every, max(2, self._steps // YOUNG))
        self._steps += 1
        return LayerObserver(self._parameters.evaluated.tensors, self._kind.largest) if due else None

    def refresh(self, evidence: Evidence) -> Cost:
        point, observer = evidence.point, evidence.observer
        self._decay = None if point.penalty is None else point.penalty.rates
        if observer is None or not point.convex or not self._factors.update(point, observer, self._generator):
            return Cost()
        self._inverse_damping = 0.0
        return Cost(refreshes=1)

    def operator(self, damping: float) -> LinearOperator | None:
        # Inverting costs as much as several gradients on wide layers; a factor of two in λ is not worth it.
        before, now = self._shifts(self._inverse_damping, self._inverse_decay), self._shifts(damping, self._decay)
        near = all(0.5 * old < new < 2 * old for old, new in zip(before, now, strict=True))
        if self._inverse_damping == 0 or not near:
            self._inverse_damping, self._inverse_decay = damping, self._decay
            self._inverse = self._factors.preconditioner(damping, self._decay)
        return self._inverse

    def _shifts(self, damping: float, decay: Sequence[float] | None) -> list[float]:
        """What is added to the curvature of each parameter."""
        return [damping + rate for rate in decay or [0.0] * len(self._parameters.tensors)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "due": self._due,
            "generator": self._generator.get_state(),
            "inverse_damping": self._inverse_damping,
            "inverse_decay": None if self._inverse_decay is None else list(self._inverse_decay),
            "factors": self._factors.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "factors" not in state or ("moments" in state["factors"]) != self._inverses.needs_cases:
            raise ValueError(OTHER_STATE)
        self._steps, self._due = state["steps"], state.get("due", 0)  # older states refresh at once
        self._generator.set_state(state["generator"].cpu())
        self._factors.load_state_dict(state["factors"])
        self._inverse_damping = state["inverse_damping"]
        decay = state.get("inverse_decay")
        self._inverse_decay = None if decay is None else tuple(decay)
        self._inverse = None
        if self._inverse_damping:
            self._inverse = self._factors.preconditioner(self._inverse_damping, self._inverse_decay)
