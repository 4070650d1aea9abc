"""How vectors over the parameters of a sharded model are divided among processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.curvature.processes import Processes


class ShardCut:
    """How a vector over tensors is divided among processes: of each tensor the chunks along one dimension.

    Args:
        shapes: of the tensors, as reals.
        dims: along which each is cut.
        processes: process r has the r-th chunk of each.

    Attributes:
        size: entries of the whole vector.
        chunks: shapes of the chunks of each process.
    """

    def __init__(self, shapes: Sequence[torch.Size], dims: Sequence[int], processes: Processes) -> None:
        self._processes, self._dims, self._shapes = processes, list(dims), list(shapes)
        self._sizes = [shape.numel() for shape in shapes]
        self.size = sum(self._sizes)
        forms = list(zip(shapes, dims, strict=True))
        self.chunks = [[_chunk(*form, rank, processes.size) for form in forms] for rank in range(processes.size)]
        self._lengths = [[chunk.numel() for chunk in own] for own in self.chunks]
        self._width = max(map(sum, self._lengths))

    def part(self, positions: Sequence[int]) -> ShardCut:
        """How a vector over some of the tensors is divided in the same way."""
        return ShardCut([self._shapes[at] for at in positions], [self._dims[at] for at in positions], self._processes)

    @property
    def lengths(self) -> list[int]:
        """How many entries of each tensor this process holds."""
        return self._lengths[self._processes.rank]

    def place(self, at: int) -> tuple[int, int]:
        """Where the chunk of this process begins along the dimension that a tensor is cut along, and its length."""
        return self._place(at, self._processes.rank)

    def _place(self, at: int, rank: int) -> tuple[int, int]:
        dim = self._dims[at]
        return min(rank * self.chunks[0][at][dim], self._shapes[at][dim]), self.chunks[rank][at][dim]

    def own(self, whole: Tensor) -> Tensor:
        return self._of(whole, self._processes.rank)

    def _of(self, whole: Tensor, rank: int) -> Tensor:
        """What a process holds of (..., n)."""
        found = []
        for at, (part, shape) in enumerate(zip(whole.split(self._sizes, -1), self._shapes, strict=True)):
            within = part.unflatten(-1, shape).narrow(self._dims[at] - len(shape), *self._place(at, rank))
            found.append(within.flatten(-len(shape)))
        return torch.cat(found, -1)

    def join(self, own: Tensor) -> Tensor:
        vectors = own.reshape(math.prod(own.shape[:-1]), own.shape[-1])
        rows = vectors.new_zeros(len(vectors), self._width)
        rows[:, : own.shape[-1]] = vectors
        every = self._processes.rows(rows.view(-1)).view(self._processes.size, *rows.shape)
        return torch.stack([self._joined(every[:, at]) for at in range(len(vectors))]).view(*own.shape[:-1], self.size)

    def _joined(self, rows: Tensor) -> Tensor:
        """The whole vector from what each process holds, (processes, width)."""
        of_ranks = [row[: sum(own)].split(own) for row, own in zip(rows, self._lengths, strict=True)]
        return torch.cat([self._whole(at, [of_rank[at] for of_rank in of_ranks]) for at in range(len(self._dims))])

    def added(self, found: Tensor) -> Tensor:
        """What this process holds of the sum of vectors (vectors, n) of all."""
        spread = found.new_zeros(self._processes.size, len(found), self._width)
        for rank, row in enumerate(spread):
            row[:, : sum(self._lengths[rank])] = self._of(found, rank)
        own = self._processes.scattered(spread.view(self._processes.size, -1)).view(len(found), self._width)
        return own[:, : sum(self.lengths)].contiguous()

    def total(self, numbers: Tensor) -> Tensor:
        return self._processes.total(numbers)

    # --- whole tensors, each in one process -----------------------------------------------------------------------

    def dealt(self, own: Tensor, owners: Sequence[int | None]) -> dict[int, Tensor]:
        """The tensors that this process is the owner of, whole, from what all have of a vector; one all-to-all.

        Args:
            own: the entries of this process, (k,).
            owners: of each tensor, the process that gets it; None for nobody.
        """
        pieces, ranks = own.split(self.lengths), range(self._processes.size)
        sent = [[piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank] for rank in ranks]
        mine = [at for at, owner in enumerate(owners) if owner == self._processes.rank]
        lengths = [[of_rank[at] for at in mine] for of_rank in self._lengths]
        rows = self._processes.exchanged([torch.cat([own[:0], *some]) for some in sent], list(map(sum, lengths)))
        parts = [row.split(of_rank) for row, of_rank in zip(rows, lengths, strict=True)]
        return {at: self._whole(at, [of_rank[k] for of_rank in parts]) for k, at in enumerate(mine)}

    def collected(self, whole: dict[int, Tensor], owners: Sequence[int | None], own: Tensor) -> Tensor:
        """The inverse of :meth:`dealt`: entries of this process (k,), ``own`` where a tensor has no owner."""
        ranks = range(self._processes.size)
        chunk = lambda at, rank: whole[at].view(self._shapes[at]).narrow(self._dims[at], *self._place(at, rank))
        sent = [torch.cat([own[:0], *(chunk(at, rank).reshape(-1) for at in whole)]) for rank in ranks]
        theirs = [[at for at, owner in enumerate(owners) if owner == rank] for rank in ranks]
        lengths = [[self.lengths[at] for at in of_rank] for of_rank in theirs]
        rows = self._processes.exchanged(sent, list(map(sum, lengths)))
        pieces = list(own.split(self.lengths))
        for row, of_rank, length in zip(rows, theirs, lengths, strict=True):
            for at, piece in zip(of_rank, row.split(length), strict=True):
                pieces[at] = piece
        return torch.cat(pieces)

    def _whole(self, at: int, parts: Sequence[Tensor]) -> Tensor:
        """A tensor, as a vector, from its chunks in all processes."""
        if self._dims[at] == 0:
            return torch.cat(list(parts))
        own = [part.view(chunks[at]) for part, chunks in zip(parts, self.chunks, strict=True)]
        return torch.cat(own, self._dims[at]).reshape(-1)


def _chunk(shape: torch.Size, dim: int, rank: int, size: int) -> torch.Size:
    """The shape of a chunk, as of ``torch.chunk``, with empty ones at the end."""
    length = -(-shape[dim] // size)
    own = max(0, min(length, shape[dim] - rank * length))
    return torch.Size([*shape[:dim], own, *shape[dim + 1 :]])
