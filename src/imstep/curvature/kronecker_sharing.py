"""Which process has the matrices of which layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from imstep.curvature.kronecker_blocks import AnyBlock, Block, EigenBlock
from imstep.curvature.processes import Processes


class Sharing:
    """What processes have of layers: all of them, every one.

    Args:
        processes: that add up what they find; None for one alone.
    """

    most: float = math.inf
    """Numbers of factors that are summed over processes at once."""

    def __init__(self, processes: Processes | None) -> None:
        self.processes = processes

    def at_once(self, blocks: Sequence[Block]) -> list[Sequence[Block]]:
        """The layers that are dealt with together."""
        return [blocks] if blocks else []

    def mine(self, weight: int) -> bool:
        """Whether this process has a layer's matrices."""
        return True

    def basis(self, block: Block, make: Callable[[], EigenBlock]) -> EigenBlock:
        """What a process makes that has the layer, in all of them."""
        return make()

    def added(self, find: Callable[[], Tensor], size: int, like: Tensor) -> Tensor:
        """The sum over processes, (size,)."""
        return find() if self.processes is None else self.processes.sum(find, size, like)

    def deal(self, forms: Iterable[tuple[int, int, int]]) -> None:
        """Decide who has which layers, given the position of the weight and the sizes of the factors of each."""

    def held(self, block: AnyBlock) -> AnyBlock:
        """What of a block that is whole everywhere is kept."""
        return block

    def part(self, at: int, whole: Tensor) -> Tensor:
        """What is kept of a tensor shaped like the parameter at a position."""
        return whole
