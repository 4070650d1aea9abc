"""What one call of ``fully_shard`` looks after: weights, directions in them and sums over them, whole or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imstep.curvature.fully_sharded import local_part
from imstep.curvature.parameters import ParameterVector, TensorVector, as_reals
from imstep.curvature.shard_cut import ShardCut


class Unit:
    """Parameters that are gathered together.

    Args:
        positions: of those that are trained, among all.
        vector: of all.
        cut: how theirs are divided among processes.
        weights: hollow tensors that stand for the whole ones, with the sharded ones; none where every process has the
            whole.
        fixed: the same for frozen ones, with what gathers each.
        kept: whether weights stay whole as long as the model is shown.
    """

    def __init__(
        self,
        positions: Sequence[int],
        vector: ParameterVector,
        cut: ShardCut,
        weights: Sequence[tuple[Tensor, Tensor]],
        fixed: Sequence[tuple[Tensor, Callable[[], Tensor]]],
        kept: bool,
    ) -> None:
        self.positions, self.cut, self.kept = list(positions), cut, kept
        self.whole: TensorVector = vector.part(positions)
        self._weights, self._fixed = list(weights), list(fixed)
        self.directions: list[Tensor] = []
        self.sums: Tensor | None = None  # what this process adds up, (1, entries), where it has begun to
        self._missing: set[int] = set()
        self.total: Tensor | None = None  # what it holds of the sums of all, (vectors, own entries)

    @property
    def weights(self) -> list[Tensor]:
        """What stands for weights."""
        return [t for t, _ in (*self._weights, *self._fixed)]

    def gather_weights(self, wanted: bool) -> None:
        """Fill what stands for weights, if ``wanted`` here; all processes call this together."""
        if self._weights:
            parts = [as_reals(local_part(shard)) for _, shard in self._weights]
            own = torch.cat([part.reshape(-1).to(self.whole.dtype) for part in parts])
            self._fill([t for t, _ in self._weights], self.cut.join(own), wanted)
        for t, gather in self._fixed:
            values = gather()
            if wanted:
                _fill(t, values)

    def gather_direction(self, own: Sequence[Tensor], wanted: bool) -> None:
        """As :meth:`gather_weights`, of a vector of which this process holds ``own``, by parameter."""
        self._fill(self.directions, self.cut.join(torch.cat([own[at] for at in self.positions])), wanted)

    def _fill(self, tensors: Sequence[Tensor], values: Tensor, wanted: bool) -> None:
        if wanted:
            for t, value in zip(tensors, self.whole.unflatten(values), strict=True):
                _fill(t, value)

    # --- sums over processes --------------------------------------------------------------------------------------

    def add(self, index: int, value: Tensor | None, weight: float) -> bool:
        """Take what this process has found of a parameter; whether it now has something of each."""
        if self.sums is None:
            self.sums = self.zeros(1)
            self._missing = set(range(len(self.positions)))
        if value is not None:
            self.whole.views(self.sums[0])[index].add_(as_reals(value), alpha=weight)
        self._missing.discard(index)
        return not self._missing

    def scatter(self, found: Tensor) -> None:
        """Add up what processes have found, (vectors, entries), each its own chunks; all call this together."""
        total = self.cut.added(found)
        self.total = total if self.total is None else self.total + total

    def scatter_sums(self, mine: bool) -> None:
        """As :meth:`scatter`, of what was taken, if ``mine`` is due, or of zeros."""
        found, self.sums = (self.sums, None) if mine else (None, self.sums)
        self.scatter(self.zeros(1) if found is None else found)

    def zeros(self, vectors: int, entries: int | None = None) -> Tensor:
        """Of vectors over its parameters, (vectors, entries)."""
        size = self.whole.size if entries is None else entries
        return torch.zeros(vectors, size, dtype=self.whole.dtype, device=self.whole.device)


def _fill(t: Tensor, values: Tensor) -> None:
    """Give a hollow tensor its values, which is no change of it."""
    t.untyped_storage().resize_(t.numel() * t.element_size())
    t.data.copy_(values)


def empty(tensors: Sequence[Tensor]) -> None:
    """Give the memory of hollow tensors back."""
    for t in tensors:
        t.untyped_storage().resize_(0)
