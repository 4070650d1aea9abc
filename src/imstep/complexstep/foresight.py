"""From one evaluation to the next: how the program of a backward pass is noted, and when it is run.

The forward pass of each evaluation is carried out operator by operator. An observer sees each step of it: of an
evaluation whose forward pass has repeated itself one that notes, of later ones one that compares and gathers what the
program needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.jumps import JUMPS
from imstep.complexstep.operations import Operation, Reference, Values, entries, tensors_in
from imstep.complexstep.pattern import Pattern
from imstep.complexstep.program import UNNUMBERED, Anatomy, Line, Need, Program, literals
from imstep.complexstep.registry import Signature
from imstep.complexstep.steps import Step
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane, Window
from imstep.complexstep.vanishing import ROOTS

_evaluations = itertools.count()
_LIBRARIES = ("aten", "prims", "imstep")  # whose operators are functions of their arguments
_WITH_EDGES = (ROOTS | JUMPS) - {id(torch.ops.aten.sgn.default)}  # that one jumps for complex numbers alone


class Gathering:
    """Compares a forward pass with that of a program, and keeps what the program needs of it.

    Attributes:
        values: what was kept.
        fit: whether all has been as it was.
    """

    def __init__(self, pattern: Pattern, program: Program) -> None:
        self.pattern, self.program, self.fit = pattern, program, True
        self.values: Values = {}
        self._versions: list[tuple[Tensor, int]] = []
        self._steps = 0

    def met(self, number: int, sig: Signature, args: Any, kwargs: Any, outputs: Any, defined: Any) -> None:
        """A step of the forward pass was recorded; what it has ``defined`` on the tape for its outputs."""
        self._steps += 1
        program = self.program
        if not self.fit or number >= len(program.literals) or literals(args, kwargs) != program.literals[number]:
            self.fit = False
            return
        needs = program.needs[number]
        if needs:
            arguments, results = tensors_in(sig.gather(args, kwargs)), entries(outputs)
            for need in needs:
                t = need.of(arguments, results)
                if t is None or t.is_inference() or not _shares(self.values.setdefault(need.number, t), t):
                    self.fit = False
                    return
                self._versions.append((t, t._version))

    def complete(self, tape: Tape) -> bool:
        """Whether the forward pass, now over, was that of the program."""
        counts = self._steps == len(self.program.literals) == len(tape.steps)
        same = tape.pattern is self.pattern and tape.inputs == self.pattern.inputs
        return self.fit and counts and same and all(t._version == version for t, version in self._versions)


class Notes:
    """Notes how a backward pass comes to the gradients.

    Attributes:
        unfit: why it cannot be run again, a sentence; None while it can.
    """

    def __init__(self, pattern: Pattern, plane: Plane, tape: Tape) -> None:
        self.pattern, self._plane, self._tape = pattern, plane, tape
        self._key = f"_imstep_constant_of_{next(_evaluations)}"
        self._literals: list[Any] = []
        self._lines: list[tuple[Operation, Step | None]] = []
        self._windows: list[Window] = []
        self._origins: dict[int, list[tuple[int, int, Window]]] = {}  # by number: steps, places, and windows there
        self.unfit: str | None = None

    # --- the forward pass ---------------------------------------------------------------------------------------

    def met(self, number: int, sig: Signature, args: Any, kwargs: Any, outputs: Any, defined: Any) -> None:
        """As of :class:`Gathering`."""
        if number != len(self._literals):
            self.unfit = "a step has escaped notice"
        self._literals.append(literals(args, kwargs))
        for place, t in enumerate(tensors_in(sig.gather(args, kwargs))):
            if self._plane.find(t) is None:
                self._mark(t, (number, place))
        for place, (t, slot) in enumerate(zip(entries(outputs), entries(defined), strict=True)):
            if slot is not None:
                self._origins[slot] = [(number, ~place, Window(t))]
            elif isinstance(t, Tensor) and self._plane.find(t) is None:
                self._mark(t, (number, ~place))

    def _mark(self, t: Tensor, origin: tuple[int, int] | None) -> int | None:
        """The number of the constant in the storage of ``t``, if it is a new one.

        One that is met at several places may be another tensor at each of them the next time: all places are kept.
        """
        if t.layout is not torch.strided:
            self.unfit = "a tensor has no strides"
            return None
        beside, window = t.untyped_storage().__dict__, Window(t)
        number, known = beside.get(self._key), self._key in beside
        if number is None:
            self._windows.append(window)
            number = beside[self._key] = -len(self._windows)
        if origin is not None:
            self._origins.setdefault(number, []).append((*origin, window))
        return None if known else number

    # --- the backward pass --------------------------------------------------------------------------------------

    def note(self, func: OpOverload, args: Any, kwargs: Any, outputs: Any, step: Step | None = None) -> None:
        """An operator of the backward pass was carried out; ``step`` has its map, None where it has none."""
        if self.unfit is not None:
            return
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random or id(func) in _WITH_EDGES or func.namespace not in _LIBRARIES:
            self.unfit = f"{func} may come to something else"
            return
        operation = Operation(func, [self._leaf(a) for a in args], {k: self._leaf(a) for k, a in kwargs.items()})
        found = entries(outputs)
        if any(t is not None and (not isinstance(t, Tensor) or t.is_complex()) for t in found):
            self.unfit = f"{func} returns something else than real tensors"
            return
        slots = [None] * len(found) if step is None else entries(step.outputs)
        new = lambda t: None if t is None else self._mark(t, None)
        operation.outputs = [new(t) if slot is None else slot for slot, t in zip(slots, found, strict=True)]
        operation.writes = {number for number in operation.outputs if number is not None}
        self._lines.append((operation, step))

    def _leaf(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._reference(a)
        return [self._leaf(t) for t in a] if isinstance(a, (list, tuple)) and tensors_in(a) else a

    def _reference(self, t: Tensor) -> Any:
        """Where a tensor is found; a copy of one that is made of a number."""
        if t.is_complex() or t.layout is not torch.strided:
            self.unfit = "a tensor is complex, or has no strides"
            return None
        slot = self._plane.find(t)
        number = t.untyped_storage().__dict__.get(self._key) if slot is None else slot
        if number is None:
            if t.ndim or t.device.type != "cpu":
                self.unfit = "a tensor comes from elsewhere"
            return t.detach().clone()
        first = self._tape.window(number) if number >= 0 else self._windows[-number - 1]
        return Reference(number, None if first.fits(t) else Window(t))

    def finish(self, anatomy: Anatomy, gradients: Sequence[Tensor | None]) -> Program | None:
        """The program, if there is one; the backward pass is over."""
        steps = self._tape.steps[len(self._literals) :]
        mapped = [step for _, step in self._lines if step is not None]
        places = {number: at for at, number in enumerate(anatomy.numbers) if number != UNNUMBERED}
        nodes = [-1 if step is None else step.node for _, step in self._lines]
        results = [None if g is None else self._reference(g) for g in gradients]
        twice = len(places) + anatomy.numbers.count(UNNUMBERED) < len(anatomy.numbers)
        if len(steps) != len(mapped) or any(a is not b for a, b in zip(steps, mapped, strict=True)):
            self.unfit = self.unfit or "memory was written to in the backward pass"
        elif twice or not {-1, *places}.issuperset(nodes):
            self.unfit = self.unfit or "nodes of the graph are not told apart by their numbers"
        elif any(not isinstance(ref, Reference) for ref in results if ref is not None):
            self.unfit = self.unfit or "a gradient is a constant"
        if self.unfit is not None:
            return None
        lines = [
            Line(operation, step is not None, -1 if node == -1 else places[node])
            for (operation, step), node in zip(self._lines, nodes, strict=True)
        ]
        return self._program(anatomy, lines, results)

    def _program(self, anatomy: Anatomy, lines: list[Line], results: list[Any]) -> Program | None:
        made = {n for line in lines for n in line.operation.writes}.union(self.pattern.inputs)
        read = {n for line in lines for n in line.operation.reads} | {ref.slot for ref in results if ref is not None}
        needs: list[list[Need]] = [[] for _ in self._literals]
        for number in read - made:
            if number not in self._origins:
                self.unfit = "a tensor comes from elsewhere"
                return None
            for step, place, window in self._origins[number]:
                needs[step].append(Need(place, number, window))
        return Program(self._literals, needs, anatomy, lines, results)


def _shares(some: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return some is other or some.untyped_storage()._cdata == other.untyped_storage()._cdata


def observer_of(tape: Tape, plane: Plane) -> Notes | Gathering | None:
    """What is to see the forward pass that begins now; None for nothing."""
    pattern = tape.pattern
    if pattern is None or pattern.plain:
        return None
    return Notes(pattern, plane, tape) if pattern.program is None else Gathering(pattern, pattern.program)
