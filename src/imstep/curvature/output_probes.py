"""Samples of a trace, taken at the outputs of layers and apart for every example.

Where y = U p is computed from a parameter p, and p is used nowhere else, the block of the Hessian that belongs to p is
Uᵀ S U, S being the second derivative of the loss in what would be added to y. Where examples do not influence each
other S falls into their blocks S_i, and

    tr H_pp = Σ_i tr U_iᵀ S_i U_i = Σ_i E[n_iᵀ S_i n_i],   n_i of mean zero and covariance U_i U_iᵀ,

so that one product with noise drawn for each example is a sample for each of them: the deviation falls with the root of
their number. Blocks between parameters are no part of it, so noise of all layers goes in at once.

If examples have few outputs z, with L'' = V λ Vᵀ the Hessian of the loss in those of one, S_i has the part
Σ_k λ_k (J_iᵀ v_k)(J_iᵀ v_k)ᵀ, whose trace takes a backward pass for each k and no noise; what remains is sampled.
Our own choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.complexstep.cotangents import uses
from imstep.complexstep.seeds import Between, first_output
from imstep.complexstep.steps import Reference, Step, slot_of
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Window
from imstep.curvature.use_forms import Draw, Map, UseForm, entrywise, form_of, signs

_FEW = 32
"""Outputs of an example with which a backward pass for each is worth its time; our own choice."""

_HALVES = 4
"""Divisions of the examples on which their independence is checked; of up to 2 to that power, every pair is."""

_LOOKUPS = {"embedding"}
"""Operators that look up rows of a table."""

_NARROW = {"mm": (0, 1), "addmm": (1, 2), "convolution": (0, 1)}
"""Operators whose node makes new gradients of what it was given, and of which arguments."""


def _apart(steps: list[Step]) -> list[Step]:
    """Those that are the only one of their node, and whose first output has slots of its own."""
    nodes = [step.node for step in steps]
    own = lambda step: step.outputs[0] if isinstance(step.outputs, list) else step.outputs
    return [step for step in steps if nodes.count(step.node) == 1 and isinstance(own(step), int)]


def _disjoint(windows: list[Window]) -> bool:
    """Whether no two entries of windows onto one memory are the same."""
    ends = [1 + int(w.offset) + sum((n - 1) * s for n, s in zip(w.size, w.stride, strict=True)) for w in windows]
    if len(windows) == 1 and math.prod(windows[0].size) == ends[0] - windows[0].offset:
        return 0 not in windows[0].stride
    numbers = torch.arange(max(ends, default=0))
    places = torch.cat([numbers.as_strided(w.size, w.stride, w.offset).reshape(-1) for w in windows] or [numbers])
    return len(places) == len(places.unique())


@dataclass(frozen=True, eq=False)
class _Use:
    """A parameter in a step."""

    parameter: int
    step: Step
    form: UseForm


class OutputProbes:
    """Samples of the traces of the diagonal blocks of one tape's matrix.

    Args:
        tape: of the derivative of a gradient, or its Gauss-Newton part, with notes of cotangents.
        device: of the parameters.

    Attributes:
        examples: N, of which each is sampled by itself; 1 where they influence each other.
        covered: by parameter, whether its block is sampled.
        products: passes over the tape so far.
    """

    def __init__(self, tape: Tape, device: torch.device) -> None:
        assert tape.cotangents is not None
        self._tape, self.products = tape, 0
        self._count, self._device = len(tape.inputs), device
        self.examples, steps = self._independent(_apart([s for s in uses(tape) if s.node in tape.cotangents.met]))
        self._uses, self.covered = self._known(steps)
        self._steps = [step for step in steps if any(use.step is step for use in self._uses)]
        self._end = self._narrow_end()
        self._curvature: Tensor | None = None
        self._sampling: tuple[Tape, list[int]] | None = None

    # --- which examples are independent -------------------------------------------------------------------------

    def _independent(self, steps: list[Step]) -> tuple[int, list[Step]]:
        """Of how many examples no two influence each other, and the steps of which that is so."""
        lengths = [self._output(step).size[0] for step in steps if self._output(step).size]
        forward = [step for step in self._tape.steps if not step.backward and step.target is None]
        sizes = [self._tape.slots[slot].window.size for step in forward for slot in step.writes()]
        candidates = {size[0] for size in sizes if len(size) and size[0] > 1}
        share = lambda n: sum(length % n == 0 for length in lengths)
        for n in sorted((n for n in candidates if 2 * share(n) >= len(steps)), key=lambda n: (-share(n), -n)):
            own = [step for step in steps if self._divides(step, n)]
            if self._coupled(own, n):
                if share(n) < len(steps) or len(own) == 1:
                    continue
                own = [step for step in own if not self._coupled([step], n, 1)]
                if 2 * len(own) < len(steps) or self._coupled(own, n):
                    continue
            if own:
                return n, own
        return 1, steps

    def _divides(self, step: Step, examples: int) -> bool:
        """Whether a step's output may be one of examples, and not of a parameter alone."""
        size = self._output(step).size
        if not size or size[0] % examples:
            return False
        return not any(
            size == self._tape.window(ref).size and entrywise(self._change(step, at, ref), size)
            for at, ref in self._taken(step)
        )

    def _coupled(self, steps: list[Step], examples: int, halves: int = _HALVES) -> bool:
        """Whether a change at the outputs of some examples changes gradients at those of others."""
        generator = torch.Generator().manual_seed(0)
        order, (tape, counts) = torch.randperm(examples, generator=generator), self._between(steps)
        for bit in range(min(halves, max(1, (examples - 1).bit_length()))):
            moved = (order >> bit) % 2 == 1
            seeds = []
            for step in steps:
                window = self._output(step)
                own = moved.repeat_interleave(window.size[0] // examples).view(-1, *[1] * (len(window.size) - 1))
                seeds.append((torch.randn(window.size, generator=generator) * own).to(self._device, window.dtype))
            for change in self._changes(tape, counts, seeds):
                if change is not None:
                    others = change.reshape(examples, -1)[~moved.to(change.device)]
                    if bool((others != 0).any()):
                        return True
        return False

    # --- which parameters are known -----------------------------------------------------------------------------

    def _known(self, steps: list[Step]) -> tuple[list[_Use], list[bool]]:
        """The uses of parameters that are used in known ways only, and which these are."""
        found: dict[int, list[tuple[_Use | None, Window]]] = {at: [] for at in range(self._count)}
        place = {slot: at for at, slot in enumerate(self._tape.inputs)}
        for step in uses(self._tape):
            taken = self._taken(step)
            for at, ref in taken:
                parameter, window = place[slot_of(ref)], self._tape.window(ref)
                form = self._form(step, at, ref) if any(step is own for own in steps) else None
                found[parameter].append((None if form is None else _Use(parameter, step, form), window))
            for slot in set(step.reads()) & place.keys() - {slot_of(ref) for _, ref in taken}:
                found[place[slot]].append((None, self._tape.slots[slot].window))  # in a list of arguments
        around = self._around()
        covered = [
            not around >> at & 1 and all(use is not None for use, _ in own) and _disjoint([w for _, w in own])
            for at, own in found.items()
        ]
        return [use for at, own in found.items() if covered[at] for use, _ in own if use is not None], covered

    def _form(self, step: Step, at: int, ref: Reference) -> UseForm | None:
        output, parameter = self._output(step), self._tape.window(ref)
        if parameter.dtype.is_complex or output.dtype is not parameter.dtype or not output.size:
            return None
        looks_up = step.func.overloadpacket.__name__ in _LOOKUPS
        return form_of(self._change(step, at, ref), parameter, output, looks_up, self.examples)

    def _change(self, step: Step, at: int, ref: Reference) -> Map:
        """The step's map from one of its arguments to its first output."""
        dtype, ims = self._tape.window(ref).dtype, [None] * len(step.inputs)

        def change(of: Tensor) -> Tensor:
            made = step.push(*ims[:at], of.to(self._device, dtype), *ims[at + 1 :])
            return made[0] if isinstance(made, (list, tuple)) else made

        return change

    def _around(self) -> int:
        """A bit for each parameter whose direction reaches its own product past the outputs of its uses."""
        inputs = {slot: 1 << at for at, slot in enumerate(self._tape.inputs)}
        nodes = {step.node for step in uses(self._tape)}
        reached = dict(inputs)
        for step in self._tape.steps:
            direct = bits = 0
            for slot in step.reads():
                if slot not in inputs:
                    bits |= reached.get(slot, 0)
                elif step.backward:
                    direct |= inputs[slot]
            # A parameter that its use is linear in has no part in its own gradient there, only in the input's.
            fused = isinstance(step.outputs, list) and step.node in nodes
            for slot in step.writes():
                if more := bits | (0 if fused and slot != step.outputs[0] else direct):
                    reached[slot] = reached.get(slot, 0) | more
        found = 0
        for at, ref in enumerate(self._tape.outputs):
            found |= 0 if ref is None else reached.get(slot_of(ref), 0) & (1 << at)
        return found

    def _taken(self, step: Step) -> list[tuple[int, Reference]]:
        """Which arguments of a step are parameters."""
        inputs = set(self._tape.inputs)
        return [(at, ref) for at, ref in enumerate(step.inputs) if type(ref) in (int, tuple) and slot_of(ref) in inputs]

    def _output(self, step: Step) -> Window:
        return self._tape.slots[first_output(step)].window

    # --- passes over the tape -----------------------------------------------------------------------------------

    def _between(self, steps: list[Step], without_end: bool = False) -> tuple[Tape, list[int]]:
        """From additions to the outputs of steps to gradients there, each the sum of so many outputs of the tape."""
        between = Between(self._tape)
        for step in steps:
            between.add_to(step)
        if without_end:
            assert self._end is not None
            between.subtract_from_gradient(self._end, self._curved)
        counts = [between.read(step) for step in steps]
        return between.finish(), counts

    def _changes(self, tape: Tape, counts: list[int], seeds: list[Tensor]) -> list[Tensor | None]:
        """What comes of seeds."""
        self.products += 1
        parts, found = iter(tape.replay(seeds)), []
        for count in counts:
            terms = [part for _, part in zip(range(count), parts, strict=False) if part is not None]
            found.append(sum(terms[1:], terms[0]) if terms else None)
        return found

    # --- samples ------------------------------------------------------------------------------------------------

    def sample(self, generator: torch.Generator) -> Tensor:
        """One sample of the trace of each example and parameter, without :meth:`exact`, (N, parameters), float64."""
        if self._sampling is None:
            self._sampling = self._between(self._steps, without_end=self._end is not None)
        noise: list[list[tuple[int, Tensor]]] = []
        for step in self._steps:
            draw = self._draw(generator, self._output(step).dtype)
            noise.append([(use.parameter, use.form.noise(draw)) for use in self._uses if use.step is step])
        seeds = [sum((n for _, n in own[1:]), own[0][1]) for own in noise]
        found = torch.zeros(self.examples, self._count, dtype=torch.float64, device=self._device)
        for own, change in zip(noise, self._changes(*self._sampling, seeds), strict=True):
            for parameter, n in own:
                if change is not None:
                    found[:, parameter] += (n * change).reshape(self.examples, -1).sum(1).double()
        return found

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> Draw:
        return lambda shape: signs(shape, generator).to(self._device, dtype)

    # --- what needs no samples ----------------------------------------------------------------------------------

    def exact(self) -> Tensor:
        """The part of the traces that goes through few outputs of each example, (parameters,), float64; else zeros."""
        found = torch.zeros(self._count, dtype=torch.float64, device=self._device)
        if self._end is None:
            return found
        self._curvature = self._at_end()
        values, vectors = torch.linalg.eigh(self._curvature.double())
        between = Between(self._tape)
        between.add_to_gradient(self._end)
        counts = [between.read(step) for step in self._steps]
        tape, output = between.finish(), self._output(self._end)
        for k in range(values.shape[1]):
            seed = vectors[:, :, k].to(output.dtype).reshape(output.size)
            for step, g in zip(self._steps, self._changes(tape, counts, [seed]), strict=True):
                for use in self._uses:
                    if use.step is step and g is not None:
                        found[use.parameter] += values[:, k] @ use.form.squares(g).double()
        return found

    def _narrow_end(self) -> Step | None:
        """The last use, if examples have few outputs there, and only what is behind it sees the gradient there."""
        if not self._steps:
            return None
        end = max(self._steps, key=lambda step: step.number)
        anew = _NARROW.get(end.func.overloadpacket.__name__, ())
        others = [ref for at, ref in enumerate(end.inputs) if at not in anew and ref is not None]
        own = bool(anew) and all(slot_of(ref) in self._tape.inputs for ref in others)
        few = math.prod(self._output(end).size) <= _FEW * self.examples
        assert self._tape.cotangents is not None
        return end if own and few and len(self._tape.cotangents.met[end.node]) == 1 else None

    def _at_end(self) -> Tensor:
        """The second derivative of the loss in the outputs of each example, (N, B, B)."""
        assert self._end is not None
        output, (tape, counts) = self._output(self._end), self._between([self._end])
        width = math.prod(output.size) // self.examples
        columns = torch.zeros(self.examples, width, width, dtype=output.dtype, device=self._device)
        for k in range(width):
            unit = torch.zeros(self.examples, width, dtype=output.dtype, device=self._device)
            unit[:, k] = 1
            (change,) = self._changes(tape, counts, [unit.reshape(output.size)])
            if change is not None:
                columns[:, :, k] = change.reshape(self.examples, width)
        return (columns + columns.mT) / 2

    def _curved(self, change: Tensor) -> Tensor:
        assert self._curvature is not None
        rows = change.reshape(self.examples, -1, 1)
        return (self._curvature @ rows).reshape(change.shape)
