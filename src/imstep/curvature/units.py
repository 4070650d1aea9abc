"""Whole weights of a sharded model, where they are needed and as long as they are.

What one call of ``fully_shard`` looks after is a unit. While a process finds its part of an evaluation, an operator
that meets a weight has the unit of it gathered, and few units are there at a time; so it is with the direction of a
product, and with what is summed over processes. These need not come to the same units in the same order, nor to all:
before each exchange they tell each other which unit they want, or that their part is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from imstep.complexstep.registry import signature
from imstep.complexstep.tensor import hollow
from imstep.curvature.parameters import CHANGED, ParameterVector, as_reals
from imstep.curvature.processes import Processes
from imstep.curvature.unit import Unit, empty
from imstep.linalg.sharded import ShardedTensor

AT_ONCE = 2
"""Units that are whole at a time: the one in use, and the one before it, to which operators may come back."""

TOGETHER = 2**16
"""Numbers that units have together which are gathered as one: an exchange of fewer takes as long. Our choice."""

_DONE = -1


class Units(TorchDispatchMode):
    """The units of a model, and what serves them to the processes.

    Args:
        units: of all that is trained, each parameter in one.
        processes: that hold the chunks.

    Attributes:
        weight, piece: what this process's part of a sum is multiplied by, and what is of a piece of its batch besides.
    """

    def __init__(self, units: Sequence[Unit], processes: Processes) -> None:
        super().__init__()
        self.units, self._processes = list(units), processes
        self._trained = [unit for unit in units if unit.positions]
        # Items that are exchanged, by number: weights of units, directions, sums.
        weights = ((u, t) for u, unit in enumerate(units) if not unit.kept for t in unit.weights)
        self._item = {t.untyped_storage()._cdata: u for u, t in weights}
        self._there: list[int] = []  # the last used at the end
        forms = {at: size for unit in units for at, size in zip(unit.positions, unit.whole.sizes, strict=True)}
        self._sizes = [forms[at] for at in sorted(forms)]
        self._place = {at: (u, k) for u, unit in enumerate(units) for k, at in enumerate(unit.positions)}
        self._direction: list[Tensor] = []
        self.weight = self.piece = 1.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every operator the wrapper that keeps PyTorch's compiler out of a mode."""
        return False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A context for this process's part of an evaluation; it ends when those of all processes have."""
        with self:
            yield
        for u, unit in enumerate(self.units):
            if unit.sums is not None:  # of which nothing was found for some parameters
                self._round(2 * len(self.units) + u)
        while not self._round(_DONE):
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.detach.default:  # other windows look at how much memory there is
            sig = signature(func)
            tensors = sig.gather(args, kwargs)
            needed = self._met(tensors)
            if needed:
                if sig.mutates and self._met([tensors[at] for at in sig.overwritten]):
                    raise ValueError(CHANGED)
                self._have(needed)
        return func(*args, **kwargs)

    def _met(self, tensors: Sequence[Any]) -> set[int]:
        found = set()
        for t in tensors:
            if isinstance(t, (list, tuple)):
                found |= self._met(t)
            elif isinstance(t, Tensor) and t.layout is torch.strided and not isinstance(t, ShardedTensor):
                item = self._item.get(t.untyped_storage()._cdata)
                if item is not None:
                    found.add(item)
        return found

    def copied(self, t: Tensor) -> Tensor:
        """A copy of what looks at memory that comes and goes; another tensor itself."""
        with _disable_current_modes():
            items = self._met([t])
            if not items:
                return t
            self._have(items)
            return t.detach().clone().requires_grad_(t.requires_grad)

    def _have(self, needed: set[int]) -> None:
        """Have items whole, and of others of their kind no more than have room beside them."""
        missing = needed.difference(self._there)
        self._there = [i for i in self._there if i not in needed] + [i for i in self._there if i in needed]
        for item in sorted(missing):
            kind = item // len(self.units)
            others = [i for i in self._there if i // len(self.units) == kind and i not in needed]
            self._release(others[: 1 - AT_ONCE])
            self._round(item)
            self._there.append(item)

    def _release(self, items: Sequence[int]) -> None:
        for item in items:
            directions, u = divmod(item, len(self.units))
            empty(self.units[u].directions if directions else self.units[u].weights)
        self._there = [item for item in self._there if item not in items]

    # --- exchanges --------------------------------------------------------------------------------------------------

    def _round(self, wanted: int) -> bool:
        """Tell the others what this process wants, and do what all want; whether all are done."""
        own = torch.tensor([wanted], device=self.units[0].whole.device)
        every = self._processes.rows(own).view(-1).tolist()
        for item in sorted({*every} - {_DONE}):
            kind, u = divmod(item, len(self.units))
            if kind == 0:
                self.units[u].gather_weights(item == wanted)
            elif kind == 1:
                self.units[u].gather_direction(self._direction, item == wanted)
            else:
                self.units[u].scatter_sums(item == wanted)
        return every == [_DONE] * len(every)

    def renew(self) -> None:
        """Have weights gathered anew; all processes call this together, since those that are kept are gathered here."""
        self._release([item for item in self._there if item < len(self.units)])
        for unit in self.units:
            if unit.kept:
                unit.gather_weights(True)

    def forget(self) -> None:
        """Release all weights."""
        self._there = [item for item in self._there if item >= len(self.units)]
        for unit in self.units:
            empty(unit.weights)

    @contextmanager
    def along(self, direction: Sequence[Tensor]) -> Iterator[None]:
        """A context in which parts may ask for a direction, of which this process has these entries, by parameter."""
        self._direction = list(direction)
        for u, unit in enumerate(self.units):
            unit.directions = [hollow(shape, dtype, unit.whole.device) for shape, dtype in unit.whole.forms]
            self._item.update({t.untyped_storage()._cdata: len(self.units) + u for t in unit.directions})
        try:
            yield
        finally:
            self._there = [item for item in self._there if item < len(self.units)]
            for unit in self.units:
                for t in unit.directions:
                    del self._item[t.untyped_storage()._cdata]
                unit.directions = []

    @property
    def directions(self) -> list[Tensor]:
        """What stands for the direction, by parameter."""
        return [self.units[u].directions[k] for _, (u, k) in sorted(self._place.items())]

    # --- sums over processes ----------------------------------------------------------------------------------------

    def add(self, at: int, value: Tensor | None) -> None:
        """Take what this process has found of the parameter at a position; what a unit comes to is summed at once."""
        u, index = self._place[at]
        with _disable_current_modes(), torch.no_grad():
            if self.units[u].add(index, value, self.weight * self.piece):
                self._round(2 * len(self.units) + u)

    def add_whole(self, found: Tensor | None, vectors: int) -> None:
        """Sum whole vectors (vectors, n), which not all processes may have; all call this together."""
        for unit in self._trained:
            if found is None:
                unit.scatter(unit.zeros(vectors))
            else:
                parts = found.split(self._sizes, 1)
                unit.scatter(torch.cat([parts[at] for at in unit.positions], 1))

    def taken(self, vectors: int) -> Tensor:
        """The entries of this process, (vectors, own entries), of all sums since the last time."""
        pieces: dict[int, Tensor] = {}
        for unit in self._trained:
            total = unit.zeros(vectors, sum(unit.cut.lengths)) if unit.total is None else unit.total
            pieces |= zip(unit.positions, total.split(unit.cut.lengths, 1), strict=True)
            unit.total = unit.sums = None
        return torch.cat([pieces[at] for at in sorted(pieces)], 1)


_LOOKS = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__}
"""Ways to numbers past the operators."""


class _Looking(TorchFunctionMode):
    """Shows copies of weights to what looks at memory past the operators."""

    def __init__(self, units: Units) -> None:
        super().__init__()
        self._units = units

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            args = [self._units.copied(a) if isinstance(a, Tensor) else a for a in args]
        return func(*args, **(kwargs or {}))


class UnitVector(ParameterVector):
    """Whole parameters that stand for sharded ones while these are evaluated.

    A sharded vector is a direction of which the parts are gathered as they are met, and what is made along it is summed
    over processes as it comes.

    Args:
        vector: of the sharded ones.
        tensors: the whole ones; hollow where they are gathered.
        units: of the model.

    Attributes:
        gathers: whether weights are gathered as they are met, and not kept.
    """

    def __init__(self, vector: ParameterVector, tensors: Sequence[Tensor], units: Units) -> None:
        vars(self).update(vars(vector.part(range(len(tensors)))))
        self.tensors, self.processes, self._units = list(tensors), vector.processes, units
        held = {id(t) for unit in units.units if not unit.kept for t in unit.weights}
        self._takes, self.gathers = False, bool(held)
        self._others = [t for t in tensors if id(t) not in held]

    @property
    def memory(self) -> list[Tensor]:
        return self._others

    def get(self) -> Tensor:
        return self._joined(self.tensors)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        return self._units.directions if isinstance(vector, ShardedTensor) else super().unflatten(vector)

    def gathered(self, vector: Tensor) -> Tensor:
        """A sharded direction, whole, in a process's part of an evaluation."""
        return self._joined(self._units.directions) if isinstance(vector, ShardedTensor) else vector

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One after the other, so that few units are whole at a time."""
        found = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for into, t in zip(self.views(found), tensors, strict=True):
            into.copy_(as_reals(t.detach()))
        return found

    def assembled(self, parts: Iterable[tuple[int, Tensor | None]], like: Tensor) -> Tensor:
        if not isinstance(like, ShardedTensor):
            return super().assembled(parts, like)
        for at, part in parts:
            self._units.add(at, part)
        return like.own.new_empty(0)

    def looked_at(self) -> AbstractContextManager[None]:
        return _Looking(self._units) if self.gathers else nullcontext()

    @contextmanager
    def taking_gradients(self) -> Iterator[None]:
        self._takes = self.gathers
        try:
            yield
        finally:
            self._takes = False

    @contextmanager
    def taken(self, note: Callable[[int, Tensor], None]) -> Iterator[list[bool]]:
        if not self._takes:
            yield []
            return
        found = [False] * len(self.tensors)

        def take(at: int, gradient: Tensor) -> Tensor:
            note(at, gradient)
            self._units.add(at, gradient)
            found[at] = True
            return gradient.new_zeros(()).expand(gradient.shape)

        handles = [p.register_hook(partial(take, at)) for at, p in enumerate(self.tensors)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def weighing(self, weight: float) -> Iterator[None]:
        before = self._units.weight
        self._units.weight, self._units.piece = before * weight, 1.0
        try:
            yield
        finally:
            self._units.weight = before

    def weigh_piece(self, weight: float) -> None:
        self._units.piece = weight
