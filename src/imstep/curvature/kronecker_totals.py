"""Kronecker factors summed over the evaluations of one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from imstep.curvature.direct import of_parameters
from imstep.curvature.kronecker_blocks import Block, Seen
from imstep.curvature.kronecker_sharing import Sharing
from imstep.curvature.layers import LayerUse
from imstep.curvature.parameters import ParameterVector, as_reals
from imstep.curvature.pieces import JointLinearisation, Linearised
from imstep.curvature.processes import Processes
from imstep.curvature.sampling import Place
from imstep.curvature.shared import SharedLinearisation

Form = tuple[int, "int | None", int, int]
"""Weight and bias of a layer by their positions, and the sizes of its factors."""

MOST_DRAWN = 2**22
"""Random numbers for an output of the whole batch, above which each process draws its own. Our choice: 32 MB."""


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the evaluations of one update.

    Attributes:
        blocks: the factors of each weight over all its uses, those of inputs summed over rows.
        rows: how many these are, of those that the loss depends on; 0-dim.
        squares: squared gradients of the other parameters.
        direct: mean curvature of losses of a parameter itself.
        seen: the uses themselves, of this process, where they are asked for.
        later: whether factors are made when they are asked for, so that they need not be there all at once.
        looked_at: whether factors that are not finite have been left out.
    """

    blocks: dict[int, Block] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    direct: dict[int, float] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    later: bool = False
    looked_at: bool = False
    _pending: dict[int, list[tuple[float, LayerUse, Tensor, torch.dtype]]] = field(default_factory=dict)

    def take(self, weight: float, use: LayerUse, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add the factors of one use."""
        self._pending.setdefault(use.weight, []).append((weight, use, gradient, dtype))
        if not self.later:
            self._add_pending(use.weight)

    def _add_pending(self, at: int) -> None:
        for of in self._pending.pop(at, []):
            self._add(*of)

    def _add(self, weight: float, use: LayerUse, gradient: Tensor, dtype: torch.dtype) -> None:
        a = use.inputs.to(dtype)
        g = gradient.detach().movedim(use.channels, -1)
        g = g.reshape(-1, g.shape[-1]).to(dtype)
        seen = g.any(1, keepdim=True)  # padding, ignored labels and the like are no rows of the curvature
        block = Block(use.weight, use.bias, (a * seen).T @ a, weight * (g.T @ g))
        old = self.blocks.get(use.weight)
        if old is not None and old.inputs.shape == block.inputs.shape:
            block = Block(use.weight, use.bias, old.inputs + block.inputs, old.outputs + block.outputs)
        self.blocks[use.weight] = block
        self.rows[use.weight] = self.rows.get(use.weight, 0) + seen.sum()

    @property
    def forms(self) -> list[Form]:
        """Weight, bias, and the sizes of the factors, of each layer."""
        made = [(b.weight, b.bias, len(b.inputs), len(b.outputs)) for b in self.blocks.values()]
        last = [uses[-1] for uses in self._pending.values()]
        return made + [(u.weight, u.bias, u.inputs.shape[1], g.shape[u.channels]) for _, u, g, _ in last]

    def part(self, form: Form) -> list[Tensor | float | None]:
        """Rows and factors of a layer, which are given out once; None where there are none of this form."""
        self._add_pending(form[0])
        b = self.blocks.pop(form[0], None)
        if b is None or (b.weight, b.bias, len(b.inputs), len(b.outputs)) != form:
            return [None] * 3
        return [self.rows[form[0]], b.inputs, b.outputs]

    def finite(self) -> dict[int, Block]:
        """The factors that are, by weight, with one synchronisation of the device for all of them."""
        if self.looked_at:
            return self.blocks
        counts = {at: rows.clamp(min=1) for at, rows in self.rows.items()}
        sums = [block.inputs.sum() / counts[at] + block.outputs.sum() for at, block in self.blocks.items()]
        usable = torch.stack(sums).isfinite().tolist() if sums else []
        return {at: block for (at, block), good in zip(self.blocks.items(), usable, strict=True) if good}


def found_together(
    parameters: ParameterVector,
    point: Linearised,
    generator: torch.Generator,
    find: Callable[[torch.Generator, Sequence[Place] | None, bool], Totals],
    sharing: Sharing,
) -> Totals:
    """The sums over processes of what each finds, by all-reduces of ``sharing.most`` numbers, after an exchange of what
    there is.

    Targets are those of one process on the whole batch, for which every process draws all random numbers, unless these
    are many or the batch is in pieces: then each process draws its own.

    Args:
        generator: the same for all processes, before and after.
        find: what this process finds, given a generator, of what its outputs are a part, and whether it makes factors
            later.
        sharing: what of the sums is kept.
    """
    processes = parameters.processes
    assert processes is not None
    assert isinstance(point, SharedLinearisation)
    later = sharing.most < math.inf and not isinstance(point.own, JointLinearisation)
    places = places_of(point, processes)
    if places is None:
        own = processes.own_generator(generator)
        return _summed(processes, parameters, generator, lambda: find(own, None, later), sharing)
    found = _summed(processes, parameters, generator, lambda: find(generator, places, later), sharing)
    squares = {at: gradient.square() for at, gradient in found.squares.items()}
    return replace(found, squares=squares)


def places_of(point: Linearised, processes: Processes) -> list[Place] | None:
    """Of what the outputs of this process are a part, one for each; None where each process draws for itself.

    All call this together.
    """
    return _places(processes.gather(lambda: _shapes(point)), processes.rank)


def _shapes(point: Linearised) -> list[tuple[bool, tuple[int, ...]]] | None:
    """Of the outputs that convex losses are of, and whether these are of parameters alone; None for pieces."""
    assert isinstance(point, SharedLinearisation)
    if point.own is None:
        return []
    if isinstance(point.own, JointLinearisation) or point.own.split is None:
        return None
    return [(of_parameters(end.z), tuple(end.z.shape)) for end in point.own.split.losses]


def _places(shapes: list[list[tuple[bool, tuple[int, ...]]] | None], rank: int) -> list[Place] | None:
    """Where the rows of this process are in the outputs of all; None where they cannot be joined, or are many."""
    if None in shapes:
        return None
    forms = {tuple((leaf, shape[1:]) for leaf, shape in of_process) for of_process in shapes if of_process}
    if len(forms) != 1:
        return None
    (form,) = forms
    found = []
    for at, (leaf, rest) in enumerate(form):
        lengths = [of_process[at][1][0] if of_process and of_process[at][1] else 0 for of_process in shapes]
        if leaf or not any(lengths):  # a parameter is no part of anything
            found.append(Place())
            continue
        if sum(lengths) * math.prod(rest) > MOST_DRAWN:
            return None
        found.append(Place(sum(lengths[:rank]), sum(lengths[rank + 1 :])))
    return found


class _Kinds(NamedTuple):
    """What a process has found of: layers; squares; direct curvature."""

    forms: list[Form]
    squares: list[int]
    direct: list[int]
    state: Tensor  # of the generator, afterwards


class _Entry(NamedTuple):
    """What goes into a sum over processes together."""

    shapes: list[torch.Size]
    find: Callable[[], list[Tensor | float | None]]  # what this process adds; None for zeros
    take: Callable[[Sequence[Tensor]], None]  # what is done with the sums

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


def _summed(
    processes: Processes,
    parameters: ParameterVector,
    generator: torch.Generator,
    find: Callable[[], Totals],
    sharing: Sharing,
) -> Totals:
    """The sums; the generator is left as by the first process that had something to draw for.

    What layers have seen stays that of this process.
    """
    own: list[Totals] = []

    def kinds() -> _Kinds:
        own.append(find())
        return _Kinds(own[0].forms, list(own[0].squares), list(own[0].direct), generator.get_state())

    every = processes.gather(kinds)
    generator.set_state(next((kinds.state for kinds in every if kinds.forms or kinds.squares), every[0].state))
    forms = {form[0]: form for kinds in reversed(every) for form in kinds.forms}
    squares = sorted({at for kinds in every for at in kinds.squares})
    direct = sorted({at for kinds in every for at in kinds.direct})
    sharing.deal((at, m, n) for at, _, m, n in forms.values())
    (mine,), one_by_one = own, sharing.most < math.inf
    total = Totals(seen=mine.seen, looked_at=one_by_one)

    def block(form: Form) -> _Entry:
        at, bias, m, n = form

        def take(found: Sequence[Tensor]) -> None:
            whole = Totals({at: Block(at, bias, *found[1:])}, {at: found[0][0]})
            total.rows.update(whole.rows)
            for usable in (whole.finite() if one_by_one else whole.blocks).values():
                total.blocks[at] = sharing.held(usable)

        return _Entry([torch.Size(s) for s in ((1,), (m, m), (n, n))], lambda: mine.part(form), take)

    def square(at: int) -> _Entry:
        take = lambda found: total.squares.update({at: sharing.part(at, found[0])})
        shape = as_reals(parameters.evaluated.tensors[at].detach()).shape
        return _Entry([shape], lambda: [mine.squares.pop(at, None)], take)

    numbers = _Entry(
        [torch.Size([1])] * len(direct),
        lambda: [mine.direct.get(at) for at in direct],
        lambda found: total.direct.update({at: float(v) for at, v in zip(direct, found, strict=True)}),
    )
    _add_up(processes, parameters, [*map(block, forms.values()), *map(square, squares), numbers], sharing.most)
    return total


def _add_up(processes: Processes, like: ParameterVector, entries: Sequence[_Entry], most: float) -> None:
    """Sum entries over processes, as many at once as have ``most`` numbers together."""
    rest = list(entries)
    while rest:
        some = [rest.pop(0)]
        while rest and sum(e.size for e in some) + rest[0].size <= most:
            some.append(rest.pop(0))
        sizes = [shape.numel() for entry in some for shape in entry.shapes]

        def part(some: Sequence[_Entry] = some, sizes: Sequence[int] = sizes) -> Tensor:
            total = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
            found = [value for entry in some for value in entry.find()]
            for into, values in zip(total.split(list(sizes)), found, strict=True):
                if values is not None:
                    into.copy_(values.reshape(-1) if isinstance(values, Tensor) else total.new_tensor([values]))
            return total

        parts = iter(processes.sum(part, sum(sizes), like).split(sizes))
        for entry in some:
            entry.take([next(parts).view(shape) for shape in entry.shapes])
