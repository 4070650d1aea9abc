"""The trace of a curvature matrix over batches, sampled at the outputs of layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imstep.curvature.output_probes import OutputProbes
from imstep.linalg import LinearOperator
from imstep.linalg.parts import TraceParts

if TYPE_CHECKING:
    from imstep.complexstep.tape import Tape
    from imstep.curvature.operators import SymmetricOperator


class OutputTraceParts(TraceParts):
    """One part for each independent example of each batch.

    Args:
        operator: the matrix.
        tapes: that it is the weighted sum of.
    """

    def __init__(self, operator: SymmetricOperator, tapes: list[tuple[float, Tape]]) -> None:
        self._operator, self._parameters = operator, operator.parameters
        self._probes = [(weight, OutputProbes(tape, operator.device)) for weight, tape in tapes]
        self.accuracy = torch.finfo(operator.dtype).eps
        self.parts = sum(probes.examples for _, probes in self._probes)
        self.covered = [all(own) for own in zip(*(probes.covered for _, probes in self._probes), strict=True)]
        self.exact = torch.stack([weight * probes.exact() for weight, probes in self._probes]).sum(0)

    @property
    def products(self) -> int:
        return math.ceil(sum(probes.products for _, probes in self._probes) / len(self._probes))

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        return torch.cat([weight * probes.sample(generator) for weight, probes in self._probes])

    def groups(self, by: str | None) -> dict[str, list[int]]:
        if by is None:
            return {"": list(range(len(self.covered)))}
        return {name: self._parameters.positions(own) for name, own in self._parameters.groups(by).items()}

    def block(self, positions: list[int]) -> LinearOperator:
        if len(positions) == len(self.covered):
            return self._operator
        return self._operator.block([self._parameters.tensors[at] for at in positions])


def parts_of(operator: SymmetricOperator, tapes: list[tuple[float, Tape]] | None) -> TraceParts | None:
    """The parts of a matrix's trace; None where it is not read off records that show them."""
    if tapes is None or operator.parameters.processes is not None:
        return None
    for _, tape in tapes:
        if tape.cotangents is None or tape.exchanges or len(tape.inputs) != len(operator.parameters.tensors):
            return None
    with torch.no_grad():
        found = OutputTraceParts(operator, tapes)
    return found if any(found.covered) else None
