"""Kronecker factors summed over the evaluations of one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from imstep.curvature.kronecker_blocks import Block, Seen
from imstep.curvature.layers import LayerUse
from imstep.curvature.parameters import ParameterVector, as_reals
from imstep.curvature.pieces import JointLinearisation, Linearised
from imstep.curvature.processes import Processes
from imstep.curvature.sampling import Place
from imstep.curvature.shared import SharedLinearisation

MOST_DRAWN = 2**22
"""Random numbers for an output of the whole batch, above which each process draws its own. Our choice: 32 MB."""


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the evaluations of one update.

    Attributes:
        blocks: the factors of each weight over all its uses, those of inputs summed over rows.
        rows: how many these are.
        squares: squared gradients of the other parameters.
        direct: mean curvature of losses of a parameter itself.
        seen: the uses themselves, of this process, where they are asked for.
    """

    blocks: dict[int, Block] = field(default_factory=dict)
    rows: dict[int, float] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    direct: dict[int, float] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def take(self, weight: float, use: LayerUse, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add the factors of one use."""
        a = use.inputs.to(dtype)
        g = gradient.detach().movedim(use.channels, -1)
        g = g.reshape(-1, g.shape[-1]).to(dtype)
        block = Block(use.weight, use.bias, a.T @ a, weight * (g.T @ g))
        old = self.blocks.get(use.weight)
        if old is not None and old.inputs.shape == block.inputs.shape:
            block = Block(use.weight, use.bias, old.inputs + block.inputs, old.outputs + block.outputs)
        self.blocks[use.weight] = block
        self.rows[use.weight] = self.rows.get(use.weight, 0) + len(a)


def found_together(
    parameters: ParameterVector,
    point: Linearised,
    generator: torch.Generator,
    find: Callable[[torch.Generator, Sequence[Place] | None], Totals],
) -> Totals:
    """The sums over processes of what each finds, by one all-reduce, after an exchange of what there is.

    Targets are those of one process on the whole batch, for which every process draws all random numbers, unless these
    are many or the batch is in pieces: then each process draws its own.

    Args:
        generator: the same for all processes, before and after.
        find: what this process finds, given a generator and of what its outputs are a part.
    """
    processes = parameters.processes
    assert processes is not None
    places = places_of(point, processes)
    if places is None:
        own = processes.own_generator(generator)
        return _summed(processes, parameters, generator, lambda: find(own, None))
    found = _summed(processes, parameters, generator, lambda: find(generator, places))
    squares = {at: gradient.square() for at, gradient in found.squares.items()}
    return replace(found, squares=squares)


def places_of(point: Linearised, processes: Processes) -> list[Place] | None:
    """Of what the outputs of this process are a part, one for each; None where each process draws for itself.

    All call this together.
    """
    return _places(processes.gather(lambda: _shapes(point)), processes.rank)


def _shapes(point: Linearised) -> list[tuple[bool, tuple[int, ...]]] | None:
    """Of the outputs that convex losses are of, and whether they are leaves; None for a batch in pieces."""
    assert isinstance(point, SharedLinearisation)
    if point.own is None:
        return []
    if isinstance(point.own, JointLinearisation) or point.own.split is None:
        return None
    return [(end.z.is_leaf, tuple(end.z.shape)) for end in point.own.split.losses]


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
    """What a process has found of: blocks, by weight, bias and sizes; squares; direct curvature."""

    blocks: list[tuple[int, int | None, int, int]]
    squares: list[int]
    direct: list[int]
    state: Tensor  # of the generator, afterwards


def _summed(
    processes: Processes, parameters: ParameterVector, generator: torch.Generator, find: Callable[[], Totals]
) -> Totals:
    """The sums; the generator is left as by the first process that had something to draw for.

    What layers have seen stays that of this process.
    """
    own: list[Totals] = []

    def kinds() -> _Kinds:
        own.append(find())
        blocks = [(b.weight, b.bias, len(b.inputs), len(b.outputs)) for b in own[0].blocks.values()]
        return _Kinds(blocks, list(own[0].squares), list(own[0].direct), generator.get_state())

    every = processes.gather(kinds)
    generator.set_state(next((kinds.state for kinds in every if kinds.blocks or kinds.squares), every[0].state))
    forms = {form[0]: form for kinds in reversed(every) for form in kinds.blocks}
    squares = sorted({at for kinds in every for at in kinds.squares})
    direct = sorted({at for kinds in every for at in kinds.direct})
    shapes = [torch.Size(shape) for _, _, m, n in forms.values() for shape in ((1,), (m, m), (n, n))]
    shapes += [as_reals(parameters.tensors[at].detach()).shape for at in squares] + [torch.Size([1])] * len(direct)
    sizes = [shape.numel() for shape in shapes]

    def part() -> Tensor:
        found: list[Tensor | float | None] = []
        for at, form in forms.items():
            b = own[0].blocks.get(at)
            alike = b is not None and (at, b.bias, len(b.inputs), len(b.outputs)) == form
            found += [own[0].rows[at], b.inputs, b.outputs] if b is not None and alike else [None] * 3
        found += [own[0].squares.get(at) for at in squares]
        found += [own[0].direct.get(at) for at in direct]
        total = parameters.get().new_zeros(sum(sizes))
        for into, values in zip(total.split(sizes), found, strict=True):
            if values is not None:
                into.copy_(values.reshape(-1) if isinstance(values, Tensor) else total.new_tensor([values]))
        return total

    whole = processes.sum(part, sum(sizes), parameters)
    parts = iter([t.view(shape) for t, shape in zip(whole.split(sizes), shapes, strict=True)])
    total = Totals(seen=own[0].seen)
    for at, (_, bias, _, _) in forms.items():
        total.rows[at] = float(next(parts))
        total.blocks[at] = Block(at, bias, next(parts), next(parts))
    total.squares.update({at: next(parts) for at in squares})
    total.direct.update({at: float(next(parts)) for at in direct})
    return total
