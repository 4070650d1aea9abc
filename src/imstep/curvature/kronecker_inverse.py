"""Inverses of Kronecker factors and of the diagonal beside them, applied to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.kronecker_blocks import Block, Inverse, LayerInverses
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.shared_inverses import inverted
from imstep.linalg import LinearOperator


@dataclass(frozen=True, eq=False)
class DampedFactors:
    """The approximation of curvature that is inverted.

    Attributes:
        blocks: of layers, disjoint.
        diagonals: of other parameters, by position.
        direct: mean curvature of losses of a parameter itself, by position.
        damping: of each parameter.
        inverses: how layers are inverted.
    """

    blocks: Sequence[Block]
    diagonals: dict[int, Tensor]
    direct: dict[int, float]
    damping: Sequence[float]
    inverses: LayerInverses

    def typical(self, facts: Tensor) -> tuple[float, list[float]]:
        """The mean diagonal entry, where it is positive, and what is added to that of each block; by what
        :func:`curvature_facts` says.

        With one synchronisation of the device for all of them.
        """
        found, count = facts.tolist(), len(self.blocks)
        means = [mean for mean, _ in found[:count]] + [s / n for s, n in found[count:] if n]
        positive = [mean for mean in means if mean > 0]
        typical = sum(positive) / len(positive) if positive else 1.0
        # Nothing passes through a layer that is not known yet: it is moved on the scale of the others.
        least = [0.0 if passes else 1e-3 * typical for _, passes in found[:count]]
        shifts = [self.damping[b.weight] + self.direct.get(b.weight, 0.0) for b in self.blocks]
        return typical, [max(pair) for pair in zip(shifts, least, strict=True)]


class KroneckerInverse(LinearOperator):
    """Applies the inverses of layers block by block, and of the diagonal.

    Args:
        parameters: the vector that it multiplies.
        factors: what is inverted.
    """

    def __init__(self, parameters: ParameterVector, factors: DampedFactors) -> None:
        super().__init__(parameters.size, parameters.dtype, parameters.device)
        self._parameters, self._factors = parameters, factors
        blocks, diagonals = factors.blocks, factors.diagonals
        typical, self._shifts = factors.typical(curvature_facts(blocks, list(diagonals.values()), self.device))
        # Processes that share out the work come to a product together, not to the loading of a state.
        self._inverses = self._made() if parameters.processes is None else None
        blocked = {at for b in blocks for at in (b.weight, b.bias)}
        self._scales = {at: scales(d, typical, factors.damping[at]) for at, d in diagonals.items() if at not in blocked}

    def _made(self) -> list[Inverse]:
        return inverted(self._parameters, self._factors.blocks, self._shifts, self._factors.inverses)

    def matvec(self, vector: Tensor) -> Tensor:
        if self._inverses is None:
            self._inverses = self._made()
        parts = dict(enumerate(self._parameters.views(vector)))
        for at, scale in self._scales.items():
            parts[at] = parts[at] * scale
        apply_blocks(list(zip(self._factors.blocks, self._inverses, strict=True)), parts)
        return self._parameters.flatten([parts[at] for at in range(len(parts))])


def scales(diagonal: Tensor, typical: float, damping: float) -> Tensor:
    """1 / (diagonal + damping); a parameter without any sampled curvature is moved on the scale of the others."""
    return 1 / (torch.where(diagonal > 0, diagonal, typical).clamp(min=1e-3 * typical) + damping)


def apply_blocks(blocks: Sequence[tuple[Block, Inverse]], parts: dict[int, Tensor]) -> None:
    """Put solutions in the place of tensors, by position among the parameters."""
    for block, inverse in blocks:
        weight = parts[block.weight]
        matrix = weight.reshape(len(weight), -1)
        if block.bias is not None:
            matrix = torch.cat([matrix, parts[block.bias][:, None]], dim=1)
        solved = inverse(matrix)
        if block.bias is not None:
            parts[block.bias] = solved[:, -1]
            solved = solved[:, :-1]
        parts[block.weight] = solved.reshape(weight.shape)


def curvature_facts(
    blocks: Sequence[Block | None], diagonals: Sequence[Tensor | None], device: torch.device
) -> Tensor:
    """Of each block the mean of its diagonal and whether anything passes through the layer; of each diagonal the sum
    of what is positive, and how many are. Zeros for None: facts of several processes add up.
    """
    facts = torch.zeros(len(blocks) + len(diagonals), 2, dtype=torch.float64, device=device)
    for fact, b in zip(facts, blocks, strict=False):
        if b is not None:
            a, g = b.inputs.diagonal(), b.outputs.diagonal()
            fact[0], fact[1] = a.mean() * g.mean(), a.any() & g.any()
    for fact, d in zip(facts[len(blocks) :], diagonals, strict=True):
        if d is not None:
            fact[0], fact[1] = d.clamp(min=0).sum(), (d > 0).sum()
    return facts
