"""Parameters of which each process holds a part, and vectors that are cut as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imstep.complexstep.tensor import hollow
from imstep.curvature import units as units_module
from imstep.curvature.fully_sharded import (
    FROM_OUTSIDE,
    Managed,
    Models,
    as_shard,
    is_sharded,
    local_part,
    local_part_as,
    managed,
    together,
)
from imstep.curvature.parameters import ParameterVector, TensorVector, as_reals
from imstep.curvature.processes import Processes
from imstep.curvature.products import Products
from imstep.curvature.shard_cut import ShardCut
from imstep.curvature.unit import Unit
from imstep.curvature.units import Units, UnitVector
from imstep.curvature.unmoved import Unmoved
from imstep.linalg.sharded import ShardedTensor
from imstep.linalg.space import Space

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def parameter_vector(params: nn.Module | Iterable[Tensor], processes: Processes | None) -> ParameterVector:
    """The vector of parameters, some of which may be sharded over the processes by ``fully_shard``."""
    params, tensors = _listed(params)
    if processes is not None and any(is_sharded(p) for p in tensors if getattr(p, "requires_grad", False)):
        return ShardedParameters(params, processes)
    return ParameterVector(params, processes)


def parameters_of(params: nn.Module | Iterable[Tensor], group: ProcessGroup | None) -> ParameterVector:
    """The vector of parameters for a group of processes, also of one alone where they are sharded."""
    params, tensors = _listed(params)
    processes = Processes.of(group)
    if group is not None and processes is None and any(map(is_sharded, tensors)):
        processes = Processes(group)
    return parameter_vector(params, processes)


def _listed(params: nn.Module | Iterable[Tensor]) -> tuple[nn.Module | Iterable[Tensor], list[Tensor]]:
    """Parameters that may be gone through again, and their tensors; one tensor in place of several is refused later."""
    if isinstance(params, Tensor):
        return params, [params]
    tensors = list(params.parameters() if isinstance(params, nn.Module) else params)
    return params if isinstance(params, nn.Module) else tensors, tensors


class ShardedParameters(ParameterVector):
    """Parameters that ``torch.distributed.fsdp.fully_shard`` has divided among processes, and others besides.

    Vectors are :class:`ShardedTensor`, cut as the parameters are; those of parameters that are not sharded are cut
    evenly. A list of one tensor for each parameter holds the process's part of those that are sharded.

    Args:
        params, processes: see :class:`ParameterVector`.

    Raises:
        ValueError: they are sharded in another way, or over other processes.
    """

    def __init__(self, params: nn.Module | Iterable[Tensor], processes: Processes) -> None:
        super().__init__(params, processes)
        self._cut_by: list[Managed | None] = managed(self.tensors, processes)
        self._models = Models([own for own in self._cut_by if own is not None])
        shapes, dims = [], []
        for shape, own in zip(self._shapes, self._cut_by, strict=True):
            shapes.append(torch.Size([shape.numel()]) if own is None else shape)
            dims.append(0 if own is None else own.dim)
        self.cut = ShardCut(shapes, dims, processes)
        self._pieces = TensorVector(
            [
                (torch.Size([self.cut.place(at)[1]]), self.dtype) if own is None else (local_part(p).shape, p.dtype)
                for at, (p, own) in enumerate(zip(self.tensors, self._cut_by, strict=True))
            ],
            self.dtype,
            self.device,
        )
        whole = [
            p if own is None else nn.Parameter(hollow(own.shape, p.dtype, p.device))
            for p, own in zip(self.tensors, self._cut_by, strict=True)
        ]
        self._units = Units(self._divided(whole), processes)
        self._evaluated = UnitVector(self, whole, self._units)
        self._shown = self._keeps = False
        self._fresh = False  # whether weights that are kept hold what the parameters do

    def _divided(self, whole: Sequence[Tensor]) -> list[Unit]:
        """The units of the model, and one of what every process has whole."""
        assert self.processes is not None
        of_group = {id(own.holder): at for at, own in enumerate(self._cut_by) if own is not None}
        units = []
        apart = together(self._models.groups, units_module.TOGETHER)
        few = len(apart) == 1 and sum(group.size for group in apart[0]) <= units_module.TOGETHER
        for groups in apart:
            positions = sorted(of_group[id(h)] for group in groups for h in group.holders if id(h) in of_group)
            weights = [(whole[at], self.tensors[at]) for at in positions]
            fixed = [pair for group in groups for pair in group.fixed]
            units.append(Unit(positions, self, self.cut.part(positions), weights, fixed, few or groups[0].kept))
        others = [at for at, own in enumerate(self._cut_by) if own is None]
        if others:
            units.append(Unit(others, self, self.cut.part(others), [], [], False))
        return units

    # --- what processes hold, and what they evaluate ------------------------------------------------------------

    @property
    def evaluated(self) -> UnitVector:
        return self._evaluated

    @property
    def blockwise(self) -> bool:
        return not self._evaluated.gathers

    @property
    def replicated(self) -> list[Tensor]:
        return [p for p, own in zip(self.tensors, self._cut_by, strict=True) if own is None]

    @property
    def memory(self) -> list[Tensor]:
        return [local_part(p) for p in self.tensors]

    @property
    def space(self) -> Space:
        return ShardedLists(self)

    def cut_along(self, at: int) -> int | None:
        """The dimension that a parameter is cut along; None for one that is not sharded."""
        own = self._cut_by[at]
        return None if own is None else own.dim

    def keep(self) -> None:
        self._keeps = True

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._shown:  # a step within a step is refused later
            yield
            return
        assert self.processes is not None
        every = zip(self._cut_by, self._evaluated.tensors, self.tensors, strict=True)
        kept = [(own, p, shard) for own, p, shard in every if own is not None]
        if any(own.holder.sharded_param is not shard for own, _, shard in kept):
            raise ValueError(
                "the model holds other parameters than the optimizer, as after load_state_dict(..., assign=True). "
                "Build the optimizer anew with model.parameters()."
            )
        try:
            self._shown = True
            if self._evaluated.gathers:
                self.processes.serving = self._units.serving
            for own, p, shard in kept:
                # What a closure must not add to, if it is not emptied: that there is something, in one number.
                one = torch.ones((), dtype=p.dtype, device=p.device)
                p.grad = None if shard.grad is None else one.expand(own.shape)
            with self._models.shown([(own, p) for own, p, _ in kept]):
                self.refresh()
                yield
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error):
                raise ValueError(FROM_OUTSIDE) from error
            raise
        finally:
            self._shown = False
            for _, p, _ in kept:
                p.grad = None
            if not self._keeps:
                self.processes.serving, self._fresh = nullcontext, False
                self._units.forget()

    def refresh(self) -> None:
        if not self._fresh:
            self._units.renew()
        self._fresh = True

    def own(self, vector: Tensor) -> ShardedTensor:
        return vector if isinstance(vector, ShardedTensor) else ShardedTensor(self.cut.own(vector), self.cut)

    def whole(self, vector: Tensor) -> Tensor:
        return vector.whole() if isinstance(vector, ShardedTensor) else vector

    @contextmanager
    def along(self, vector: Tensor) -> Iterator[Tensor]:
        if self._evaluated.gathers:
            with self._units.along(self.own(vector).own.split(self.cut.lengths)):
                yield vector
        else:
            yield self.whole(vector)

    def summed(
        self, part: Callable[[], Tensor | None], numbers: int, vectors: int = 0, direction: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert self.processes is not None
        found: list[Tensor] = []

        def evaluated() -> Tensor | None:
            values = part()
            if values is None:
                return None
            if values.numel() > numbers:
                found.append(values[numbers:].view(vectors, self.size))
            return torch.cat([values.new_full((1,), len(found)), values[:numbers]])

        # Numbers by themselves, since these must be the same to the last bit in all processes.
        self._units.taken(vectors)  # what a sum that failed has left
        head = self.processes.sum(evaluated, 1 + numbers, self)
        if head[0] > 0:
            self._units.add_whole(found[0] if found else None, vectors)
        return head[1:], ShardedTensor(self._units.taken(vectors), self.cut)

    # --- vectors and lists --------------------------------------------------------------------------------------

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        pieces = [
            t if t is None or own is not None else self._slice(as_reals(t.detach()).reshape(-1), at)
            for at, (t, own) in enumerate(zip(tensors, self._cut_by, strict=True))
        ]
        return ShardedTensor(self._pieces.flatten(pieces), self.cut)

    def _slice(self, flat: Tensor, at: int) -> Tensor:
        """What this process has in a vector of a parameter that is not sharded."""
        start, length = self.cut.place(at)
        return flat.narrow(0, start, length)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        pieces = self._pieces.unflatten(self.own(vector).own)
        if not self.replicated:
            return pieces
        whole = super().unflatten(self.whole(vector))
        chosen = zip(pieces, whole, self._cut_by, strict=True)
        return [other if own is None else piece for piece, other, own in chosen]

    def gradients(self, vector: Tensor) -> list[Tensor]:
        found = zip(super().gradients(vector), self._cut_by, self.tensors, strict=True)
        return [g if own is None else as_shard(g, p) for g, own, p in found]

    def spread(self, values: Sequence[float]) -> Tensor:
        lengths = torch.tensor(self.cut.lengths, device=self.device)
        numbers = torch.tensor(values, dtype=self.dtype, device=self.device)
        return ShardedTensor(numbers.repeat_interleave(lengths), self.cut)

    def norm(self) -> float:
        squares = self.own(self.get()).own.double().square().sum()
        return float(self.cut.total(squares).sqrt())

    def _moved(self) -> None:
        self._fresh = False
        if not self._shown:
            self._models.reshard()


class ShardedLists:
    """Lists of tensors for vectors: of shards for sharded vectors, of whole tensors for whole ones.

    Args:
        parameters: that the vectors are of.
    """

    def __init__(self, parameters: ShardedParameters) -> None:
        self._parameters = parameters

    def checked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._parameters.checked(tensors)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        if not any(map(is_sharded, tensors)):
            return self._parameters.evaluated.flatten(tensors)
        pairs = zip(tensors, self._parameters.tensors, strict=True)
        return self._parameters.flatten([None if t is None else local_part_as(t, p) for t, p in pairs])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        if isinstance(vector, ShardedTensor):
            return self._parameters.gradients(vector)
        return self._parameters.evaluated.unflatten(vector)

    def places(self, by: str) -> dict[str, Tensor]:
        return self._parameters.places(by)


def shown_for(parameters: ParameterVector, products: Products) -> Products:
    """Products that evaluate a model, with whole parameters gathered for the time of each where they are sharded."""
    return _ShownProducts(parameters, products) if parameters.evaluated is not parameters else products


class _ShownProducts(Products):
    """Products between which no whole parameters are kept, unless records refer to them."""

    def __init__(self, parameters: ParameterVector, products: Products) -> None:
        super().__init__(products.rows, products.columns)
        self._parameters, self._products, self._unmoved = parameters, products, Unmoved(parameters)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self._products.nbytes

    def one(self, direction: Tensor) -> Tensor:
        with self._shown():
            return self._products.one(direction)

    def several(self, directions: Tensor) -> Tensor:
        with self._shown():
            return self._products.several(directions)

    def _shown(self) -> AbstractContextManager[None]:
        assert self._parameters.processes is not None
        self._parameters.processes.gather(self._unmoved)  # what one has changed all would evaluate
        return self._parameters.shown()
