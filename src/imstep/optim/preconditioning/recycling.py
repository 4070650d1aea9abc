"""A preconditioner that keeps what the last Krylov iterations have found."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.layers import LayerObserver
from imstep.curvature.parameters import ParameterVector
from imstep.linalg import IdentityOperator, LimitedMemoryPreconditioner, LinearOperator
from imstep.linalg.dots import dots
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.preconditioning.kronecker import Kronecker
from imstep.optim.record import Cost


@dataclass(frozen=True)
class Recycling(Preconditioning):
    """Another preconditioner, updated by the directions and products of the last steps.

    From step to step the curvature changes little. Every product that a Krylov iteration made is used again, in the
    BFGS formula, so that the next one does not find the same directions anew. It adds no product. Where a step is on
    another function than the last one, the loss of another batch, the directions are dropped.

    Args:
        base: the preconditioner that is updated.
        pairs: how many directions are kept, with their products, >= 1: twice as many vectors of memory, also in
            ``state_dict``, and four inner products or sums of vectors for each in every iteration.

    Source: Morales and Nocedal, SIAM J. Optim. 10 (2000), 1079-1096; the number of pairs is our choice.
    """

    base: Preconditioning = field(default_factory=Kronecker)
    pairs: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.base, Preconditioning):
            raise TypeError(f"base must be a Preconditioning, got {self.base!r}. Pass Kronecker(), for instance.")
        if self.pairs < 1:
            raise ValueError(f"pairs is at least 1, got {self.pairs}. To keep none, use the base alone.")

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _Recycled(self.base.make(parameters), self.pairs, parameters)


class _Recycled(Preconditioner):
    def __init__(self, base: Preconditioner, pairs: int, parameters: ParameterVector) -> None:
        self._base, self._parameters = base, parameters
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=pairs)

    @property
    def pairs_wanted(self) -> int:
        return self._pairs.maxlen or 0

    def observer(self) -> LayerObserver | None:
        return self._base.observer()

    def refresh(self, evidence: Evidence) -> Cost:
        return self._base.refresh(evidence)

    def learn(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pairs.extend(pairs)

    def forget(self) -> None:
        self._pairs.clear()

    def operator(self, damping: float) -> LinearOperator | None:
        base = self._base.operator(damping)
        if not self._pairs:
            return base
        if base is None:
            parameters = self._parameters
            identity = IdentityOperator(parameters.size, dtype=parameters.dtype, device=parameters.device)
            base = inverse_size(reversed(self._pairs), damping) * identity
        return LimitedMemoryPreconditioner(base, list(self._pairs), damping)

    def state_dict(self) -> dict[str, Any]:
        pairs = [{"direction": p, "image": image} for p, image in self._pairs]
        return {"pairs": pairs, "base": self._base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "pairs" not in state:
            raise ValueError(OTHER_STATE)
        self._base.load_state_dict(state["base"])
        self._pairs.clear()
        own = self._parameters.own
        self._pairs.extend((own(pair["direction"]), own(pair["image"])) for pair in state["pairs"])


def inverse_size(pairs: Iterable[tuple[Tensor, Tensor]], damping: float) -> float:
    """The multiple of I that stands for (A + λI)⁻¹ beside pairs; without it units of the loss would matter.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), (7.20).
    """
    for direction, image in pairs:
        damped = torch.add(image, direction, alpha=damping)
        across, along = dots((direction, damped), (damped, damped))
        if across > 0 and 0 < along < math.inf:
            return across / along
    return 1.0  # no pair will be used
