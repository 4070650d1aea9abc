"""A trace as a sum of parts that can be sampled each by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator


class TraceParts(ABC):
    """The traces of the diagonal blocks of an operator, one for each parameter of a model: of those that are covered

        tr A_pp = exact_p + Σ_m E[sample_mp]

    Attributes:
        parts: M, parts whose samples are independent.
        exact: (parameters,), float64.
        covered: by parameter, whether its block is sampled here.
        accuracy: relative rounding of the products.
    """

    parts: int
    exact: Tensor
    covered: list[bool]
    accuracy: float

    @property
    @abstractmethod
    def products(self) -> int:
        """What has been done so far, in products with the operator."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """A sample of each part and parameter, (M, parameters), float64; one product."""

    @abstractmethod
    def groups(self, by: str | None) -> dict[str, list[int]]:
        """Positions of the parameters of each layer, or each by itself, by name; all together for None."""

    @abstractmethod
    def block(self, positions: list[int]) -> LinearOperator:
        """The diagonal block of some parameters."""
