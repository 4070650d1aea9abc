"""Kronecker factors of a sharded model: those of a layer lie in one process, which inverts and applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.kronecker_blocks import AnyBlock, Block, EigenBlock, Inverse, locally
from imstep.curvature.kronecker_inverse import (
    DampedFactors,
    KroneckerInverse,
    apply_blocks,
    curvature_facts,
    scales,
)
from imstep.curvature.kronecker_sharing import Sharing
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes
from imstep.curvature.sharded import ShardedParameters
from imstep.linalg import LinearOperator
from imstep.linalg.sharded import ShardedTensor, own_entries

TOGETHER = 2**20
"""Numbers of factors that are summed over processes at once, a larger layer's by themselves. Our choice: 8 MB."""


class RowCut:
    """How rows are divided among processes: each has some, one process's below the other's; see `Cut`.

    Args:
        lengths: how many each has.
        processes: that have them.
    """

    def __init__(self, lengths: Sequence[int], processes: Processes) -> None:
        self.lengths, self._processes, self.size = list(lengths), processes, sum(lengths)
        self._place = sum(self.lengths[: processes.rank]), self.lengths[processes.rank]

    def own(self, whole: Tensor) -> Tensor:
        return whole.narrow(-1, *self._place)

    def join(self, own: Tensor) -> Tensor:
        whole = own.new_zeros(*own.shape[:-1], self.size)
        whole.narrow(-1, *self._place).copy_(own)
        return self._processes.total(whole)

    def total(self, numbers: Tensor) -> Tensor:
        return self._processes.total(numbers)

    def shortened(self) -> RowCut:
        """Without the last row of those that have some."""
        return RowCut([max(length - 1, 0) for length in self.lengths], self._processes)


class Dealt(Sharing):
    """Each layer's matrices are in one process: the largest first, each in the one that has the least.

    No process holds more than an even share and one layer. What is dealt once stays where it is.

    Args:
        parameters: of the model.
    """

    most = TOGETHER

    def __init__(self, parameters: ShardedParameters) -> None:
        assert parameters.processes is not None
        super().__init__(parameters.processes)
        self.parameters, self.group = parameters, parameters.processes
        self._owner: dict[int, int] = {}
        self._load = [0] * self.group.size

    def deal(self, forms: Iterable[tuple[int, int, int]]) -> None:
        """Give layers, by the position of their weight and the sizes of their factors, to processes."""
        for weight, m, n in sorted(forms, key=lambda form: -(form[1] ** 2 + form[2] ** 2)):
            if weight not in self._owner:
                self._owner[weight] = self._load.index(min(self._load))
                self._load[self._owner[weight]] += m**2 + n**2

    def owner(self, weight: int) -> int:
        """The process that has a layer."""
        return self._owner[weight]

    def mine(self, weight: int) -> bool:
        return self._owner[weight] == self.group.rank

    def matrix(self, weight: int, whole: Tensor) -> Tensor:
        """A layer's matrix, with its entries in the layer's process."""
        if isinstance(whole, ShardedTensor):
            return whole
        rows = [len(whole) if rank == self._owner[weight] else 0 for rank in range(self.group.size)]
        own = whole.clone() if self.mine(weight) else whole.new_empty(0, *whole.shape[1:])
        return ShardedTensor(own, RowCut(rows, self.group), 0)

    def part(self, at: int, whole: Tensor) -> Tensor:
        """A tensor shaped like a parameter, sharded as that is."""
        dim, cut = self.parameters.cut_along(at), self.parameters.cut
        if dim is None or isinstance(whole, ShardedTensor):
            return whole
        lengths = [chunks[at][dim] for chunks in cut.chunks]
        return ShardedTensor(whole.narrow(dim, *cut.place(at)).clone(), RowCut(lengths, self.group), dim)

    # --- moments in eigenvectors --------------------------------------------------------------------------------

    def at_once(self, blocks: Sequence[Block]) -> list[Sequence[Block]]:
        return [[block] for block in blocks]

    def basis(self, block: Block, make: Callable[[], EigenBlock]) -> EigenBlock:
        made: list[EigenBlock] = []
        out, inner = len(block.outputs), len(block.inputs)

        def part() -> Tensor | None:
            if not self.mine(block.weight):
                return None
            made.append(make())
            return torch.cat([made[0].inputs.reshape(-1), made[0].outputs.reshape(-1)])

        found = self.group.sum(part, inner**2 + out**2, self.parameters)
        inputs, outputs = found.split([inner**2, out**2])
        values = made[0].values if made else found.new_zeros(out, inner)
        return EigenBlock(block.weight, block.bias, inputs.view(inner, inner), outputs.view(out, out), values)

    def held(self, block: AnyBlock) -> AnyBlock:
        whole = {name: value for name, value in vars(block).items() if isinstance(value, Tensor)}
        kept: Any = {name: self.matrix(block.weight, value) for name, value in whole.items()}
        return replace(block, **kept)


def sharing_of(parameters: ParameterVector) -> Sharing:
    """Who has what of a model's layers."""
    return Dealt(parameters) if isinstance(parameters, ShardedParameters) else Sharing(parameters.processes)


def inverse_of(sharing: Sharing, parameters: ParameterVector, factors: DampedFactors) -> LinearOperator:
    """The inverse of damped factors."""
    return DealtInverse(sharing, factors) if isinstance(sharing, Dealt) else KroneckerInverse(parameters, factors)


class DealtInverse(LinearOperator):
    """Applies the inverses of layers, each in its process, to sharded vectors; that of the diagonal everywhere.

    Args:
        dealing: who has what.
        factors: what is inverted.

    Cost: two all-to-all of n numbers over W, and 1/W of the multiplications.
    """

    def __init__(self, dealing: Dealt, factors: DampedFactors) -> None:
        parameters = dealing.parameters
        super().__init__(parameters.size, parameters.dtype, parameters.device)
        self._dealing, self._parameters, self._factors = dealing, parameters, factors
        owners = {at: dealing.owner(b.weight) for b in factors.blocks for at in (b.weight, b.bias) if at is not None}
        self._owners = [owners.get(at) for at in range(len(parameters.tensors))]

    @cached_property
    def _made(self) -> tuple[list[tuple[Block, Inverse]], Tensor]:
        """This process's layers with their inverses; what its entries of other parameters are multiplied by.

        At the first product, to which all processes come together, and not at the loading of a state.
        """
        processes, blocks = self._dealing.group, self._factors.blocks
        mine = [self._dealing.mine(b.weight) for b in blocks]
        facts = curvature_facts(
            [locally(b) if own else None for b, own in zip(blocks, mine, strict=True)],
            # What is whole in all processes counts once.
            [
                own_entries(d) if isinstance(d, ShardedTensor) or processes.rank == 0 else None
                for d in self._factors.diagonals.values()
            ],
            self.device,
        )
        typical, shifts = self._factors.typical(processes.total(facts))
        made: list[tuple[Block, Inverse]] = []

        def invert() -> None:
            for block, shift, own in zip(blocks, shifts, mine, strict=True):
                if own:
                    block = locally(block)
                    made.append((block, self._factors.inverses.inverse(block, shift)))

        processes.sum(invert, 0, self._parameters)
        return made, self._scales(typical)

    def _scales(self, typical: float) -> Tensor:
        pieces = []
        for at, (length, owner) in enumerate(zip(self._parameters.cut.lengths, self._owners, strict=True)):
            d = self._factors.diagonals.get(at)
            if d is None or owner is not None:
                pieces.append(torch.ones(length, dtype=self.dtype, device=self.device))
                continue
            own = own_entries(d).reshape(-1)
            own = own if isinstance(d, ShardedTensor) else own.narrow(0, *self._parameters.cut.place(at))
            pieces.append(scales(own, typical, self._factors.damping[at]))
        return torch.cat(pieces)

    def matvec(self, vector: Tensor) -> Tensor:
        made, factors = self._made
        own, cut = self._parameters.own(vector).own, self._parameters.cut
        whole = cut.dealt(own, self._owners)
        parts = {at: t.view(self._parameters.tensors[at].shape) for at, t in whole.items()}
        apply_blocks(made, parts)
        return ShardedTensor(cut.collected(parts, self._owners, own * factors), cut)
