"""A preconditioner times the rate that suits it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.layers import LayerObserver
from imstep.curvature.parameters import ParameterVector
from imstep.linalg import IdentityOperator, LinearOperator
from imstep.linalg.dots import dots, norm_in_range
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost


@dataclass(frozen=True)
class AutomaticRate(Preconditioning):
    """ηP for another preconditioner P, with η in proportion to the inverse of the preconditioned curvature.

        η = share / λ_max(P^(1/2) A P^(1/2)),   by the power method

    Steps of ηP alone, ``PreconditionedGradient(products=False)`` with ``FixedStep()``, then need no rate to be tuned.
    P and η are those of the last estimate, with its λ. Without any curvature the first step has length 1.

    Args:
        base: P, refreshed as often.
        every: steps between two estimates of η, >= 1.
        share: > 0; below 2 for a quadratic.
        iterations: of the power method, >= 1: products.
        seed: of its start; it does not touch the global random state.

    Source: Frangella, Rathore, Zhao and Udell, SIAM J. Math. Data Sci. 6 (2024), arXiv 2211.08597, section 2.3, with
        share 1/2.
    """

    base: Preconditioning
    every: int = 50
    share: float = 0.5
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.base, Preconditioning):
            raise TypeError(f"base must be a Preconditioning, got {self.base!r}. Pass Nystrom(), for instance.")
        if self.every < 1 or self.iterations < 1 or not self.share > 0:
            raise ValueError(
                f"every and iterations are at least 1 and share is positive, got {self.every}, {self.iterations} and "
                f"{self.share}."
            )

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _Rated(self, parameters)


class _Rated(Preconditioner):
    def __init__(self, kind: AutomaticRate, parameters: ParameterVector) -> None:
        self._kind, self._base = kind, kind.base.make(parameters)
        self._steps, self._rate, self._damping = 0, 0.0, 0.0
        self._generator = torch.Generator(device=parameters.device).manual_seed(kind.seed)
        self._identity = IdentityOperator(parameters.size, dtype=parameters.dtype, device=parameters.device)

    def observer(self) -> LayerObserver | None:
        return self._base.observer()

    def refresh(self, evidence: Evidence) -> Cost:
        cost = self._base.refresh(evidence)
        if self._steps % self._kind.every == 0:
            self._damping = evidence.damping
            largest = self._largest(evidence)
            if 0 < largest < math.inf:
                self._rate = self._kind.share / largest
            elif self._rate == 0:
                self._rate = 1 / (norm_in_range(evidence.point.gradient) or 1.0)
        self._steps += 1
        return cost

    def _largest(self, evidence: Evidence) -> float:
        """λ_max of P^(1/2) A P^(1/2) in size, by v <- P A v of length 1 in the norm of P⁻¹."""
        P, A = self._unrated(), evidence.curvature
        start = torch.empty_like(evidence.point.gradient).normal_(generator=self._generator)
        image, size = start, 0.0  # of which v is P times
        for iteration in range(self._kind.iterations + 1):
            vector = P.matvec(image)
            size = max(dots((image, vector))[0], 0.0) ** 0.5
            if not 0 < size < math.inf:
                return size
            if iteration < self._kind.iterations:
                image = A @ (vector / size)
        return size

    def operator(self, damping: float) -> LinearOperator | None:
        return self._rate * self._unrated()

    def _unrated(self) -> LinearOperator:
        return self._base.operator(self._damping) or self._identity

    @property
    def pairs_wanted(self) -> int:
        return self._base.pairs_wanted

    def learn(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._base.learn(pairs)

    def forget(self) -> None:
        self._base.forget()

    def state_dict(self) -> dict[str, Any]:
        numbers = {"steps": self._steps, "rate": self._rate, "damping": self._damping}
        return {"rated": numbers, "generator": self._generator.get_state(), "base": self._base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "rated" not in state:
            raise ValueError(OTHER_STATE)
        self._steps, self._rate, self._damping = (state["rated"][name] for name in ("steps", "rate", "damping"))
        self._generator.set_state(state["generator"].cpu())
        self._base.load_state_dict(state["base"])
