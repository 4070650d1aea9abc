"""Preconditioning by a randomised low-rank approximation of the curvature matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator, NystromApproximation, adaptive_nystrom
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost


@dataclass(frozen=True)
class Nystrom(Preconditioning):
    """A low-rank approximation of the curvature matrix by products with a block of random vectors.

        A ≈ U Λ Uᵀ,   P = U (Λ + λI)⁻¹ Uᵀ + (I - U Uᵀ) / (Λᵣ + λ)

    Args:
        rank: r, the products of a refresh, >= 1; as many vectors are kept, also in ``state_dict``.
        every: steps between two refreshes, >= 1.
        largest: up to this rank it is doubled until Λᵣ <= 10 λ; None for the same rank always.
        seed: of the random vectors; they do not touch the global random state.

    Source: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44 (2023), 718-752; rank and period are our choice.
    """

    rank: int = 20
    every: int = 20
    largest: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1:
            raise ValueError(f"rank and every are at least 1, got {self.rank} and {self.every}.")
        if self.largest is not None and self.largest < self.rank:
            raise ValueError(f"largest is at least rank = {self.rank}, got {self.largest}.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _Nystrom(self, parameters)


class _Nystrom(Preconditioner):
    def __init__(self, kind: Nystrom, parameters: ParameterVector) -> None:
        self._kind, self._steps = kind, 0
        self._generator = torch.Generator(device=parameters.device).manual_seed(kind.seed)
        self._approximation: NystromApproximation | None = None

    def refresh(self, evidence: Evidence) -> Cost:
        if self._steps % self._kind.every == 0:
            approximation = adaptive_nystrom(
                evidence.curvature,
                evidence.damping,
                generator=self._generator,
                rank=self._kind.rank,
                largest=self._kind.largest or self._kind.rank,
            )
            if bool(torch.isfinite(approximation.values).all()):
                self._approximation = approximation
        self._steps += 1
        return Cost()

    def operator(self, damping: float) -> LinearOperator | None:
        return None if self._approximation is None else self._approximation.preconditioner(damping)

    def state_dict(self) -> dict[str, Any]:
        known = self._approximation
        return {
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "vectors": None if known is None else known.vectors,
            "values": None if known is None else known.values,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "vectors" not in state:
            raise ValueError(OTHER_STATE)
        self._steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
        vectors, values = state["vectors"], state["values"]
        self._approximation = None if vectors is None else NystromApproximation(vectors, values)
