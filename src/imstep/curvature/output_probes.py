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
from imstep.complexstep.seeds import Between
from imstep.complexstep.steps import Reference, Step, slot_of
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Window
from imstep.curvature.independence import independent
from imstep.curvature.output_space import Layout, OutputSpace, Passes
from imstep.curvature.use_forms import UseForm, form_of, signs

_FEW = 32
"""Outputs of an example with which a backward pass for each is worth its time; our own choice."""

_DTYPES = (torch.float32, torch.float64)
"""Of parameters: what tells uses apart takes more digits than half precision has."""

_LOOKUPS = {"embedding"}
"""Operators that look up rows of a table."""

_NARROW = {"mm": (0, 1), "addmm": (1, 2), "convolution": (0, 1)}
"""Operators whose node makes new gradients of what it was given, and of which arguments."""


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
    """

    def __init__(self, tape: Tape, device: torch.device) -> None:
        self._space, self._tape, self._count = OutputSpace(tape, device), tape, len(tape.inputs)
        self.examples, self._places = independent(self._space)
        known, self.covered = self._known()
        self._uses = [(step, [use for use in known if use.step is step]) for step, _ in self._places.values()]
        self._uses = [(step, own) for step, own in self._uses if own]
        self._steps = [step for step, _ in self._uses]
        self._end = self._narrow_end()
        self._curvature: Tensor | None = None
        self._sampling: Passes | None = None

    @property
    def products(self) -> int:
        """Passes over the tape so far."""
        return self._space.products

    # --- which parameters are known -----------------------------------------------------------------------------

    def _known(self) -> tuple[list[_Use], list[bool]]:
        """The uses of parameters that are used in known ways only, and which these are."""
        found: dict[int, list[tuple[_Use | None, Window]]] = {at: [] for at in range(self._count)}
        place = {slot: at for at, slot in enumerate(self._tape.inputs)}
        for step in uses(self._tape):
            taken = self._space.taken(step)
            for at, ref in taken:
                parameter, window = place[slot_of(ref)], self._tape.window(ref)
                form = self._form(step, at, ref) if step.number in self._places else None
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
        output, parameter = self._space.output(step), self._tape.window(ref)
        if parameter.dtype not in _DTYPES or output.dtype is not parameter.dtype or not output.size:
            return None
        layout, change = self._places[step.number][1], self._space.change(step, at, ref)

        def leading(of: Tensor) -> Tensor:
            made = change(of)
            if made.ndim < len(output.size):  # what is broadcast
                made = made.expand(output.size)
            return layout.leading(made, self.examples)

        size = layout.leading(torch.empty(output.size, device="meta"), self.examples).shape
        looks_up = step.func.overloadpacket.__name__ in _LOOKUPS
        return form_of(leading, parameter, size, looks_up, self.examples)

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
            # A use that is linear in a parameter leaves it no part in its own gradient there, only in the input's.
            fused = isinstance(step.outputs, list) and step.node in nodes
            for slot in step.writes():
                if more := bits | (0 if fused and slot != step.outputs[0] else direct):
                    reached[slot] = reached.get(slot, 0) | more
        found = 0
        for at, ref in enumerate(self._tape.outputs):
            found |= 0 if ref is None else reached.get(slot_of(ref), 0) & (1 << at)
        return found

    # --- samples ------------------------------------------------------------------------------------------------

    def sample(self, generator: torch.Generator) -> Tensor:
        """One sample of the trace of each example and parameter, without :meth:`exact`, (N, parameters), float64."""
        if self._sampling is None:
            self._sampling = self._space.passes(self._seeded, self._steps)
        noise = [self._noise(step, own, generator) for step, own in self._uses]
        changes = self._sampling([sum(own[1:], own[0]) for own in noise])
        found = torch.zeros(self.examples, self._count, dtype=torch.float64, device=self._space.device)
        for (step, uses_of), own, change in zip(self._uses, noise, changes, strict=True):
            for use, n in zip(uses_of, own, strict=True):
                if change is not None:
                    product = self._places[step.number][1].leading(n * change, self.examples)
                    found[:, use.parameter] += product.reshape(self.examples, -1).sum(1).double()
        return found

    def _seeded(self, between: Between) -> None:
        for step in self._steps:
            between.add_to(step)
        if self._end is not None:
            between.subtract_from_gradient(self._end, self._curved)

    def _noise(self, step: Step, own: list[_Use], generator: torch.Generator) -> list[Tensor]:
        """Of each use in a step."""
        layout, dtype = self._places[step.number][1], self._space.output(step).dtype
        draw = lambda shape: signs(shape, generator).to(self._space.device, dtype)
        return [layout.back(use.form.noise(draw), self.examples) for use in own]

    # --- what needs no samples ----------------------------------------------------------------------------------

    def exact(self) -> Tensor:
        """The part of the traces that goes through few outputs of each example, (parameters,), float64; else zeros."""
        found = torch.zeros(self._count, dtype=torch.float64, device=self._space.device)
        if (end := self._end) is None:
            return found
        self._curvature = self._at_end(end)
        values, vectors = torch.linalg.eigh(self._curvature.double())
        backward = self._space.passes(lambda between: between.add_to_gradient(end), self._steps)
        for k in range(values.shape[1]):
            changes = backward([vectors[:, :, k].to(self._curvature.dtype).reshape(self._space.output(end).size)])
            for (step, own), g in zip(self._uses, changes, strict=True):
                if g is None:
                    continue
                g = self._places[step.number][1].leading(g, self.examples)
                for use in own:
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
        few = math.prod(self._space.output(end).size) <= _FEW * self.examples
        together = self._places[end.number][1] is Layout.TOGETHER
        usable = own and few and together and len(self._space.met[end.node]) == 1
        return end if usable and self._space.are_adjoint(self._steps, end) else None

    def _at_end(self, end: Step) -> Tensor:
        """The second derivative of the loss in the outputs of each example, (N, B, B)."""
        output, passes = self._space.output(end), self._space.between([end])
        width = math.prod(output.size) // self.examples
        columns = torch.zeros(self.examples, width, width, dtype=output.dtype, device=self._space.device)
        for k in range(width):
            unit = torch.zeros_like(columns[:, 0])
            unit[:, k] = 1
            (change,) = passes([unit.reshape(output.size)])
            if change is not None:
                columns[:, :, k] = change.reshape(self.examples, width)
        return (columns + columns.mT) / 2

    def _curved(self, change: Tensor) -> Tensor:
        assert self._curvature is not None
        rows = change.reshape(self.examples, -1, 1)
        return (self._curvature @ rows).reshape(change.shape)
