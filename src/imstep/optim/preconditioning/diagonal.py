"""Preconditioning by a diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator, diagonal_preconditioner, hutchinson_diagonal
from imstep.linalg.dots import norm_in_range, unit_of
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost


@dataclass(frozen=True)
class Hutchinson(Preconditioning):
    """The diagonal of the curvature matrix, estimated by products with random signs, in a running mean.

        P = diag((max(|d|, floor · mean |d|) + λ)^-power)

    Args:
        every: steps between two estimates, >= 1.
        probes: products for one, >= 1.
        decay: weight of the past in the running mean, in [0, 1); the first estimates are averaged evenly.
        power: in (0, 1]; less than 1 trusts the estimate less.
        floor: least entry relative to the mean, in (0, 1].
        seed: of the signs; they do not touch the global random state.

    Source: Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57 (2007), for the estimate; Martens, ICML 2010, section 4.7,
        for the power; the running mean, the floor and the numbers are our choice.
    """

    every: int = 5
    probes: int = 1
    decay: float = 0.9
    power: float = 0.75
    floor: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.probes < 1:
            raise ValueError(f"every and probes are at least 1, got {self.every} and {self.probes}.")
        _check(self.decay, self.power, self.floor)

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _Hutchinson(self, parameters)


@dataclass(frozen=True)
class SquaredGradients(Preconditioning):
    """The running mean v of the squared gradient: it costs no product.

        P = diag(max(v, floor · mean v)^-power)

    The scale of v is not that of the curvature, so the damping stays out of P.

    Args:
        decay: weight of the past in the running mean, in [0, 1); the first gradients are averaged evenly.
        power: in (0, 1].
        floor: least entry relative to the mean, in (0, 1].

    Source: the scaling is that of AdaGrad (Duchi, Hazan & Singer, JMLR 12, 2011) and Adam (Kingma & Ba, ICLR 2015) for
        power 1/2; as a preconditioner our choice.
    """

    decay: float = 0.95
    power: float = 0.5
    floor: float = 0.1

    def __post_init__(self) -> None:
        _check(self.decay, self.power, self.floor)

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _SquaredGradients(self)


class _RunningMean:
    """A mean of vectors in which the past counts `decay`, the first ones evenly; vectors not finite are left out."""

    def __init__(self, decay: float) -> None:
        self._decay, self._taken = decay, 0
        self.value: Tensor | None = None

    def take(self, sample: Tensor) -> None:
        if not bool(torch.isfinite(sample).all()):
            return
        keep = min(1 - 1 / (self._taken + 1), self._decay)
        self._taken += 1
        self.value = sample if self.value is None else keep * self.value + (1 - keep) * sample

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken, self.value = state["taken"], state["value"]


class _Hutchinson(Preconditioner):
    def __init__(self, kind: Hutchinson, parameters: ParameterVector) -> None:
        self._kind, self._mean, self._steps = kind, _RunningMean(kind.decay), 0
        self._generator = torch.Generator(device=parameters.device).manual_seed(kind.seed)

    def refresh(self, evidence: Evidence) -> Cost:
        if self._steps % self._kind.every == 0:
            estimate = hutchinson_diagonal(evidence.curvature, self._kind.probes, generator=self._generator)
            self._mean.take(estimate.mean)
        self._steps += 1
        return Cost()

    def operator(self, damping: float) -> LinearOperator | None:
        if self._mean.value is None:
            return None
        return diagonal_preconditioner(
            self._mean.value, damping=damping, power=self._kind.power, floor=self._kind.floor
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "generator": self._generator.get_state(), "diagonal": self._mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "diagonal" not in state:
            raise ValueError(OTHER_STATE)
        self._steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
        self._mean.load_state_dict(state["diagonal"])


_SQUARED = 1e-12
"""Norm of a gradient from which the squares of its entries, also of the small ones, lie well within float32."""


class _SquaredGradients(Preconditioner):
    def __init__(self, kind: SquaredGradients) -> None:
        self._kind, self._mean = kind, _RunningMean(kind.decay)
        self._unit = 1.0  # of gradients whose squares would leave the range of float32; P is then in units of its own

    @property
    def needs_products(self) -> bool:
        return False

    def refresh(self, evidence: Evidence) -> Cost:
        gradient = evidence.point.gradient
        if self._mean.value is None and not _SQUARED < norm_in_range(gradient) < 1 / _SQUARED:
            self._unit = unit_of(gradient)
        self._mean.take((self._unit * gradient) ** 2)
        return Cost()

    def operator(self, damping: float) -> LinearOperator | None:
        if self._mean.value is None:
            return None
        return diagonal_preconditioner(self._mean.value, power=self._kind.power, floor=self._kind.floor)

    def state_dict(self) -> dict[str, Any]:
        return {"squares": self._mean.state_dict(), "unit": self._unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "squares" not in state:
            raise ValueError(OTHER_STATE)
        self._mean.load_state_dict(state["squares"])
        self._unit = state.get("unit", 1.0)  # older states had no other


def _check(decay: float, power: float, floor: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}.")
    if not (0 < power <= 1 and 0 < floor <= 1):
        raise ValueError(f"power and floor must lie in (0, 1], got {power} and {floor}.")
