"""Which examples of a batch do not influence each other, found out on the record of a derivative."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imstep.complexstep.steps import Step
from imstep.curvature.output_space import Layout, OutputSpace, Places
from imstep.curvature.use_forms import entrywise

_HALVES = 4
"""Divisions of the examples on which their independence is checked; of up to 2 to that power, every pair is."""

_TRIED = 4
"""Numbers of examples that are tried; each that fails costs some passes."""


def independent(space: OutputSpace) -> tuple[int, Places]:
    """Of how many examples none influences another, with the steps of which that is so; they are half of all at least.

    A change at the outputs of some examples must leave gradients at those of the others what they are, exactly. A
    number of examples is a length that outputs of the forward pass have, so that nothing needs to be told.

    Returns:
        1 and all steps where no number will do.
    """
    steps = space.steps()
    best = 1, Places()
    for examples in _numbers(space, steps)[:_TRIED]:
        for places in _arrangements(space, steps, examples):
            if 2 * len(places) < len(steps) or len(places) <= len(best[1]):
                continue
            if not _coupled(space, places, examples):
                best = examples, places
            if len(best[1]) == len(steps):
                return best
    return best if best[1] else (1, {step.number: (step, Layout.TOGETHER) for step in steps})


def _numbers(space: OutputSpace, steps: list[Step]) -> list[int]:
    """Numbers of examples that half of the steps may have, those that most have in the usual layout first."""
    forward = [step for step in space.tape.steps if not step.backward and step.target is None]
    sizes = [space.tape.slots[slot].window.size for step in forward for slot in step.writes()]
    candidates = {n for size in sizes for n in (*size[:1], *(size[1:2] if len(size) > 2 else ())) if n > 1}
    layouts = {n: [space.layouts(step, n) for step in steps] for n in candidates}
    share = {n: sum(map(bool, own)) for n, own in layouts.items()}
    usual = {n: sum(Layout.TOGETHER in some for some in own) for n, own in layouts.items()}
    fitting = [n for n in candidates if 2 * share[n] >= len(steps) > 0]
    return sorted(fitting, key=lambda n: (-usual[n], -share[n], -n))


def _arrangements(space: OutputSpace, steps: list[Step], examples: int) -> Iterator[Places]:
    """Steps with layouts that may be theirs: first the usual ones, then what a change at the last or first shows."""
    own = [step for step in steps if not _of_parameters_alone(space, step)]
    usual = [step for step in own if Layout.TOGETHER in space.layouts(step, examples)]
    yield {step.number: (step, Layout.TOGETHER) for step in usual}
    for start in [own[-1], own[0]] if own else []:
        for layout in space.layouts(start, examples):
            yield _shown(space, own, start, layout, examples)


def _shown(space: OutputSpace, steps: list[Step], start: Step, layout: Layout, examples: int) -> Places:
    """The layouts in which a change of some examples at one step leaves the others alone at each."""
    moved = _half(examples, 0)
    found: Places = {}
    changes = space.between([start], steps)([_seed(space, start, layout, moved)])
    for step, change in zip(steps, changes, strict=True):
        for own in space.layouts(step, examples):
            if not _reaches(change, own, moved):
                found[step.number] = step, own
                break
    return found


def _coupled(space: OutputSpace, places: Places, examples: int) -> bool:
    """Whether a change at the outputs of half of the examples changes gradients at those of the others."""
    passes = space.between([step for step, _ in places.values()])
    for half in range(min(_HALVES, (examples - 1).bit_length())):
        moved = _half(examples, half)
        changes = passes([_seed(space, step, layout, moved) for step, layout in places.values()])
        if any(_reaches(change, at, moved) for change, (_, at) in zip(changes, places.values(), strict=True)):
            return True
    return False


def _half(examples: int, at: int) -> Tensor:
    """By example, whether it is of a half; halves are by the bits of numbers given to examples at random."""
    numbers = torch.randperm(examples, generator=torch.Generator().manual_seed(0))
    return (numbers >> at) % 2 == 1


def _seed(space: OutputSpace, step: Step, layout: Layout, moved: Tensor) -> Tensor:
    """Random numbers at the outputs of some examples."""
    window = space.output(step)
    seed = torch.randn(window.size, generator=torch.Generator().manual_seed(step.number)).to(window.dtype)
    leading = layout.leading(seed, len(moved)).contiguous()
    leading.view(len(moved), -1)[~moved] = 0
    return layout.back(leading, len(moved)).to(space.device)


def _reaches(change: Tensor | None, layout: Layout, moved: Tensor) -> bool:
    """Whether a change is anything but zero at an example that was not moved."""
    if change is None:
        return False
    others = layout.leading(change, len(moved)).reshape(len(moved), -1)[~moved.to(change.device)]
    return bool((others != 0).any())


def _of_parameters_alone(space: OutputSpace, step: Step) -> bool:
    """Whether a step makes a tensor of the parameter's size of it entry by entry, such as a multiple of a weight."""
    size = space.output(step).size
    return any(
        size == space.tape.window(ref).size and entrywise(space.change(step, at, ref), size)
        for at, ref in space.taken(step)
    )
