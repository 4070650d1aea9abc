"""Outputs of operators on parameters, and which of their entries belong to which example."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imstep.complexstep.cotangents import uses
from imstep.complexstep.seeds import Between, first_output
from imstep.complexstep.steps import Reference, Step, slot_of
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Window
from imstep.curvature.use_forms import Map


class Layout(enum.Enum):
    """Where the examples of an output are: along its first dimension, those of an example together; along the first,
    examples in turn, as if (time, examples) were merged; or along the second.
    """

    TOGETHER, IN_TURN, SECOND = range(3)

    def fits(self, size: Sequence[int], examples: int) -> bool:
        """Whether an output of this size may have its examples there."""
        if self is Layout.SECOND:
            return len(size) > 2 and size[1] == examples
        return len(size) > 0 and size[0] % examples == 0 and (self is Layout.TOGETHER or size[0] > examples)

    def leading(self, t: Tensor, examples: int) -> Tensor:
        """``t`` with the examples along the first dimension, those of one together."""
        if self is Layout.IN_TURN:
            return t.reshape(-1, examples, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
        return t if self is Layout.TOGETHER else t.transpose(0, 1)

    def back(self, t: Tensor, examples: int) -> Tensor:
        """The inverse of :meth:`leading`."""
        if self is Layout.IN_TURN:
            return t.reshape(examples, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
        return self.leading(t, examples)


_NORMS = ("native_layer_norm", "native_batch_norm", "cudnn_batch_norm", "native_group_norm", "_fused_rms_norm")
_LINEAR = {"mm", "addmm", "convolution", "embedding", "add", "sub", "mul", *_NORMS}
"""Operators that are linear in each of their arguments that may be a parameter; of norms those are the scale and shift.
Others would add a second derivative of their own."""

_CHANNELS = ("conv", "batch_norm", "group_norm")
"""Parts of the names of operators whose outputs have channels along the second dimension."""

Places = dict[int, tuple[Step, Layout]]
"""Steps by their numbers, with the layouts of their outputs."""


class OutputSpace:
    """A tape seen from the outputs of the operators that take its inputs.

    Args:
        tape: with notes of cotangents.
        device: of its inputs.

    Attributes:
        products: passes over the tape so far.
    """

    def __init__(self, tape: Tape, device: torch.device) -> None:
        assert tape.cotangents is not None
        self.tape, self.device, self.products = tape, device, 0
        self.met = tape.cotangents.met
        self._inputs = set(tape.inputs)

    def steps(self) -> list[Step]:
        """Those of linear operators whose outputs' gradients are known: met, and the only ones of their nodes."""
        linear = [step for step in uses(self.tape) if step.func.overloadpacket.__name__ in _LINEAR]
        met = [step for step in linear if step.node in self.met]
        nodes = [step.node for step in met]
        own = lambda step: step.outputs[0] if isinstance(step.outputs, list) else step.outputs
        return [step for step in met if nodes.count(step.node) == 1 and isinstance(own(step), int)]

    def output(self, step: Step) -> Window:
        """How the first output of a step looks."""
        return self.tape.slots[first_output(step)].window

    def layouts(self, step: Step, examples: int) -> list[Layout]:
        """Where the examples of a step's output may be."""
        name, size = step.func.overloadpacket.__name__, self.output(step).size
        channels = any(part in name for part in _CHANNELS)
        return [at for at in Layout if at.fits(size, examples) and not (at is Layout.SECOND and channels)]

    def taken(self, step: Step) -> list[tuple[int, Reference]]:
        """Which arguments of a step are parameters."""
        return [(at, r) for at, r in enumerate(step.inputs) if type(r) in (int, tuple) and slot_of(r) in self._inputs]

    def change(self, step: Step, at: int, ref: Reference) -> Map:
        """The step's map from one of its arguments to its first output."""
        dtype, ims = self.tape.window(ref).dtype, [None] * len(step.inputs)

        def change(of: Tensor) -> Tensor:
            made = step.push(*ims[:at], of.to(self.device, dtype), *ims[at + 1 :])
            return made[0] if isinstance(made, (list, tuple)) else made

        return change

    def between(self, added: list[Step], read: list[Step] | None = None) -> Passes:
        """From additions to the outputs of steps to changes of the gradients there, or at other steps."""

        def prepare(between: Between) -> None:
            for step in added:
                between.add_to(step)

        return self.passes(prepare, added if read is None else read)

    def passes(self, prepare: Callable[[Between], None], read: list[Step]) -> Passes:
        """From what is prepared to changes of the gradients at the outputs of steps."""
        between = Between(self.tape)
        prepare(between)
        counts = [between.read(step) for step in read]
        return Passes(self, between.finish(), counts)

    def are_adjoint(self, steps: list[Step], end: Step) -> bool:
        """Whether the backward pass from a step's output to others is the transpose of the way forward.

        It is not where a Function has a backward pass of its own making, such as a rounding that passes gradients on.
        """
        forward = Between(self.tape)
        for step in steps:
            forward.add_to(step)
        count, generator = forward.read_output(end), torch.Generator().manual_seed(0)
        windows = [self.output(step) for step in [*steps, end]]
        *seeds, weight = [torch.randn(w.size, generator=generator).to(self.device, w.dtype) for w in windows]
        (output,) = Passes(self, forward.finish(), [count])(seeds)
        gradients = self.passes(lambda between: between.add_to_gradient(end), steps)([weight])
        back = sum(float((g * n).sum()) for g, n in zip(gradients, seeds, strict=True) if g is not None)
        if output is None:
            return back == 0
        return abs(float((output * weight).sum()) - back) <= 1e-4 * float(output.norm() * weight.norm())


class Passes:
    """Passes over one tape, counted.

    Args:
        counts: how many outputs of the tape add up to each result.
    """

    def __init__(self, space: OutputSpace, tape: Tape, counts: list[int]) -> None:
        self._space, self._tape, self._counts = space, tape, counts

    def __call__(self, seeds: list[Tensor]) -> list[Tensor | None]:
        """What comes of seeds."""
        self._space.products += 1
        parts, found = iter(self._tape.replay(seeds)), []
        for count in self._counts:
            terms = [part for part in [next(parts) for _ in range(count)] if part is not None]
            found.append(sum(terms[1:], terms[0]) if terms else None)
        return found
