"""Inverses of Kronecker factors, each made by one of several processes and sent to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.curvature.kronecker_blocks import Block, Inverse, LayerInverses, Work
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes

WORTH_SENDING = 256
"""Rows of a factor from which its inverse is shared out. Our choice: n³ operations at 10¹⁰ a second then take three
times as long as 8 n² bytes at 10 Gbit/s.
"""


def inverted(
    parameters: ParameterVector, blocks: Sequence[Block], dampings: Sequence[float], inverses: LayerInverses
) -> list[Inverse]:
    """The inverse of each block; processes share out the work, all of which call this, and get the same, bit for bit.

    Cost: of a process the largest factors' n³ operations, Σ n³ over the number of processes where these are even; one
        sum of n² numbers for each factor that is shared out.
    """
    if parameters.processes is None:
        return [inverses.inverse(*of) for of in zip(blocks, dampings, strict=True)]
    works = [inverses.work(*of) for of in zip(blocks, dampings, strict=True)]
    parts = iter(_done(parameters.processes, [work for of_block in works for work in of_block], parameters))
    taken = [[next(parts) for _ in of_block] or None for of_block in works]
    return [inverses.inverse(*of) for of in zip(blocks, dampings, taken, strict=True)]


def _done(processes: Processes, works: Sequence[Work], parameters: ParameterVector) -> list[Tensor]:
    """What comes of each: of small factors in every process, of others in one of them."""
    large = [work for work in works if len(work.factor) >= WORTH_SENDING]
    takers = assigned([len(work.factor) for work in large], processes.size)

    def own() -> Tensor:
        made = [
            work.compute() if taker == processes.rank else work.factor.new_zeros(work.shape, dtype=work.dtype)
            for work, taker in zip(large, takers, strict=True)
        ]
        return torch.cat([matrix.reshape(-1) for matrix in made])

    found: dict[int, Tensor] = {}
    if large:
        sizes = [work.shape[0] * work.shape[1] for work in large]
        whole = processes.sum(own, sum(sizes), parameters.get().new_empty(0, dtype=large[0].dtype))
        found = {id(w): t.view(w.shape) for w, t in zip(large, whole.split(sizes), strict=True)}
    return [found[id(work)] if id(work) in found else work.compute() for work in works]


def assigned(rows: Sequence[int], processes: int) -> list[int]:
    """Which process inverts each matrix: the largest first, each given to the one with the least to do.

    >>> assigned([100, 300, 100, 290], 2)
    [1, 0, 1, 1]
    """
    load, taker = [0] * processes, [0] * len(rows)
    for at in sorted(range(len(rows)), key=lambda at: -rows[at]):
        taker[at] = load.index(min(load))
        load[taker[at]] += rows[at] ** 3
    return taker
