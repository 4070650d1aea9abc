"""Linearise once, replay many times.

In infinitesimal arithmetic the real parts do not depend on the direction. A tape keeps, for every operator of one
evaluation, the linear map from imaginary inputs to imaginary outputs. Recording it costs one evaluation of the real
parts; applying it to a direction runs only the maps. Memory is addressed by slots, one per storage,
and windows onto them, as in :mod:`imstep.complexstep.tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from imstep.complexstep.captured import captured, exchange
from imstep.complexstep.cotangents import Cotangents
from imstep.complexstep.replay import Arrangement, Replay, Slot
from imstep.complexstep.steps import Reference, Step, slot_of
from imstep.complexstep.tensor import HOLLOW, Window, entries_behind, parts

if TYPE_CHECKING:
    from imstep.complexstep.pattern import Foreseen, Pattern, Patterns

class TapeChangedError(RuntimeError):
    """A tensor that the tape holds was overwritten after it was recorded."""


class TapeTooLargeError(RuntimeError):
    """What a tape holds would take more memory than it was given."""


class Tape:
    """The linear maps of one evaluation, in order.

    Args:
        memory_budget: bytes that its maps may hold, parameters included; None for no limit.
        patterns: those of earlier tapes, of which this one may be another; None for none.

    Attributes:
        cotangents: where the backward pass meets the outputs of operators on inputs; None where nobody looks.
        static: whether the backward pass was run as a list of operators, that of an earlier evaluation.
        kin: all tapes that have maps in common with this one.
    """

    @property
    def exchanges(self) -> bool:
        """Whether replays wait for those of other processes, which therefore take the same directions at once."""
        return any(step.exchanges for step in self._steps)

    def __init__(self, memory_budget: int | None = None, patterns: Patterns | None = None) -> None:
        self._memory_budget, self._bytes = memory_budget, 0
        self._patterns, self.static = patterns, False
        self._pattern: Pattern | None = None if patterns is None else patterns.first()  # followed so far
        self._slots: list[Slot] = []
        self._steps: list[Step] = []
        self._inputs: list[int] = []
        self._outputs: list[Reference | None] = []
        self._replay: Replay | None = None
        self._held: list[tuple[Tensor, int | None, Any]] = []  # a tensor, its version, the map that holds it
        self._places: dict[int, list[int]] = {}  # which of these lie in a storage
        self._found = 0  # how many of these were looked for
        self.cotangents: Cotangents | None = None
        self.kin: WeakSet[Tape] = WeakSet([self])

    # --- recording ----------------------------------------------------------------------------------------------

    def input(self, t: Tensor) -> int:
        """A slot for the direction of the input ``t``."""
        self._inputs.append(self.define(t))
        return self._inputs[-1]

    def define(self, t: Tensor) -> int:
        """A slot for the imaginary part of the storage of the fresh tensor ``t``."""
        entries, number = entries_behind(t), len(self._slots)
        slot = None
        if self._pattern is not None:
            if not self._pattern.has(number, t, entries):
                self._go_on(lambda pattern: pattern.has(number, t, entries))
            slot = None if self._pattern is None else self._pattern.slots[number]
        self._slots.append(slot or Slot(Window(t), entries))
        return number

    def reference(self, slot: int, t: Tensor) -> Reference:
        """How ``t`` looks onto ``slot``."""
        return slot if self._slots[slot].window.fits(t) else (slot, Window(t))

    @property
    def foreseen(self) -> Foreseen | None:
        """The next step, as an earlier tape had it, while all has been as in that one."""
        number, pattern = len(self._steps), self._pattern
        return pattern.steps[number] if pattern is not None and number < len(pattern.steps) else None

    @property
    def pattern(self) -> Pattern | None:
        """The structure of an earlier tape, while all has been as in that one."""
        return self._pattern

    def mark(self) -> tuple[int, int, int, Pattern | None]:
        """Where the recording is, for :meth:`rewind`."""
        return len(self._slots), len(self._steps), len(self._held), self._pattern

    def rewind(self, mark: tuple[int, int, int, Pattern | None]) -> None:
        """Forget what was recorded since."""
        slots, steps, held, self._pattern = mark
        del self._slots[slots:], self._steps[steps:], self._held[held:]
        self._places, self._found, self._bytes = {}, 0, 0

    def _go_on(self, fits: Callable[[Pattern], bool]) -> None:
        """Follow the pattern on, or another that is like it so far, if it ``fits``; else none any more."""
        pattern, patterns = self._pattern, self._patterns
        if pattern is None or patterns is None or fits(pattern):
            return
        others = patterns.others(pattern, len(self._slots), len(self._steps))
        self._pattern = next((other for other in others if fits(other)), None)

    def record(self, step: Step, known: bool = False) -> None:
        """Append a step; remembers the tensors that its map holds, to notice when they are overwritten.

        Args:
            known: whether it is the one that was foreseen.
        """
        number, push = len(self._steps), step.push
        step.number = number
        if self._pattern is not None and not known:
            self._go_on(lambda pattern: pattern.foresees(number, step))
        self._steps.append(step)
        if push is None:
            return
        held = self._held
        for t in captured(push):
            held.append((t, None if t.is_inference() else t._version, push))
        if self._memory_budget is not None:
            self._find_places()

    def _find_places(self) -> None:
        """Note in which memory lies what was held since the last time; counts the bytes of it."""
        for number in range(self._found, len(self._held)):
            for part in parts(self._held[number][0]):
                storage = part.untyped_storage()
                if storage._cdata not in self._places:
                    self._bytes += 0 if HOLLOW in storage.__dict__ else storage.nbytes()
                self._places.setdefault(storage._cdata, []).append(number)
        self._found = len(self._held)
        if self._memory_budget is not None and self._bytes > self._memory_budget:
            raise TapeTooLargeError(
                f"the recorded derivative takes more than the memory budget of {self._memory_budget} bytes."
            )

    def protect(self, t: Tensor) -> None:
        """Give recorded maps that hold the memory of ``t`` a copy of it, because it is about to be overwritten.

        They are the maps of tapes that were made of this one, too.
        """
        if t.layout is torch.strided:
            copies: dict[int, tuple[Tensor, Tensor]] = {}
            for tape in self.kin:
                tape._take_copies(t, copies)

    def _take_copies(self, t: Tensor, copies: dict[int, tuple[Tensor, Tensor]]) -> None:
        """As :meth:`protect`, for this tape; ``copies`` are by the identity of what was copied, and with it."""
        self._find_places()
        numbers = self._places.pop(t.untyped_storage()._cdata, ())
        for n in numbers:
            held = self._held[n][0]
            if id(held) not in copies:
                copies[id(held)] = held, held.clone()
        for n in numbers:
            held, _, push = self._held[n]
            exchange(push, lambda held: copies[id(held)][1] if id(held) in copies else held)
            copy = copies[id(held)][1]
            self._held[n] = copy, copy._version, push
            for part in parts(copy):
                self._places.setdefault(part.untyped_storage()._cdata, []).append(n)

    def finish(self, outputs: Sequence[Reference | None], arrangement: Arrangement | None = None) -> None:
        """Name the outputs; drops what they do not depend on.

        Args:
            arrangement: of the steps, where it is known.

        Raises:
            TapeChangedError: the evaluation overwrote a tensor that one of its maps still needs.
        """
        self._outputs = list(outputs)
        pattern = self._pattern
        if pattern is not None and not pattern.is_of(len(self._slots), len(self._steps), self._inputs, outputs):
            pattern = None
        arrangement = arrangement if pattern is None else pattern.arrangement
        self._replay = Replay(self._slots, self._inputs, self._steps, self._outputs, arrangement)
        if self._patterns is not None and pattern is not None:
            self._patterns.met(pattern)
        elif self._patterns is not None:
            structure = self._slots, self._inputs, self._steps, outputs, self._replay.arrangement
            pattern = self._patterns.missed(*structure)
        self._pattern = pattern
        self._steps = self._replay.steps
        for step in self._steps:
            step.args, step.result = (), None  # the arguments of possible losses have served their purpose
        maps = {id(step.push) for step in self._steps}
        self._held = [held for held in self._held if held[1] is not None and id(held[2]) in maps]
        self._places, self._found, self._bytes = {}, 0, 0
        self.check()
        if any(_is_released(t) for t, *_ in self._held):
            raise TapeChangedError("the memory of a tensor was released after its use was recorded.")

    def with_inputs(self, at: Sequence[int], inputs: Callable[[], list[list[Any]]]) -> Tape:
        """A tape on the same memory some of whose steps, those ``at``, have other inputs.

        Args:
            inputs: makes them; the same for all tapes of one structure.
        """
        known = {} if self._pattern is None else self._pattern.derived
        found = known.get(tuple(at))
        exchanged = inputs() if found is None else found[0]
        steps = list(self._steps)
        for number, refs in zip(at, exchanged, strict=True):
            steps[number] = steps[number].reading(refs)
        other = self._derived(steps, self._inputs, self._outputs, None if found is None else found[1])
        if found is None:
            known[tuple(at)] = exchanged, other._replay.arrangement  # type: ignore[union-attr]
        return other

    def watching(self, references: Sequence[Reference]) -> Tape:
        """A tape whose replays return the imaginary parts at ``references`` as well, after the outputs."""
        return self._derived(self._steps, self._inputs, [*self._outputs, *references])

    def reaching(self, references: Sequence[Reference]) -> Tape:
        """A tape whose replays return the imaginary parts at ``references`` in place of the outputs."""
        return self._derived(self._steps, self._inputs, references)

    def restricted(self, inputs: Sequence[int], outputs: Sequence[int]) -> Tape:
        """A tape from some of the inputs to some of the outputs, by position, without steps that no path takes."""
        if list(inputs) == [*range(len(self._inputs))] and list(outputs) == [*range(len(self._outputs))]:
            return self
        chosen = [self._inputs[at] for at in inputs]
        live = set(chosen)
        steps = []
        for step in self._steps:
            reads = [*step.reads(), *([] if step.target is None else [slot_of(step.target)])]
            if step.exchanges or not live.isdisjoint(reads):
                steps.append(step)
                live.update(step.writes())
        return self._derived(steps, chosen, [self._outputs[at] for at in outputs])

    def rebuilt(
        self, slots: list[Slot], steps: list[Step], inputs: list[int], outputs: Sequence[Reference | None]
    ) -> Tape:
        """A tape on more memory: slots that begin with those of this one."""
        return self._derived(steps, inputs, outputs, slots=slots)

    def _derived(
        self,
        steps: list[Step],
        inputs: list[int],
        outputs: Sequence[Reference | None],
        arrangement: Arrangement | None = None,
        slots: list[Slot] | None = None,
    ) -> Tape:
        other = Tape()
        other._slots, other._held, other._steps, other._inputs = slots or self._slots, self._held, steps, inputs
        other.cotangents, other.kin = self.cotangents, self.kin
        self.kin.add(other)
        other.finish(outputs, arrangement)
        return other

    def probe(self, device: torch.device) -> list[Tensor]:
        """A direction for each input: numbers that stand in no simple relation."""
        generator = torch.Generator(device).manual_seed(0)
        windows = [self._slots[slot].window for slot in self._inputs]
        return [torch.randn(w.size, generator=generator, dtype=w.dtype, device=device) for w in windows]

    @property
    def steps(self) -> list[Step]:
        """The steps, in order; read only."""
        return self._steps

    @property
    def inputs(self) -> list[int]:
        """The slots of the inputs, in order."""
        return self._inputs

    @property
    def outputs(self) -> list[Reference | None]:
        """What replays compute, in order."""
        return self._outputs

    @property
    def slots(self) -> list[Slot]:
        """The memory; read only."""
        return self._slots

    def window(self, reference: Reference) -> Window:
        """How a reference looks onto its slot."""
        return reference[1] if type(reference) is tuple else self._slots[reference].window  # type: ignore[index]

    # --- what it holds ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape keeps alive, parameters included unless hollow; each storage counted once."""
        storages = [part.untyped_storage() for t, *_ in self._held for part in parts(t)]
        return sum({s.data_ptr(): s.nbytes() for s in storages if HOLLOW not in s.__dict__}.values())

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the mean and of the largest imaginary part that a replay computes."""
        written = {slot for step in self._steps for slot in step.writes()}
        sizes = [self._slots[slot].entries * self._slots[slot].window.dtype.itemsize for slot in written]
        return (sum(sizes) // len(sizes), max(sizes)) if sizes else (0, 0)

    def check(self) -> None:
        """Raise :class:`TapeChangedError` if a tensor that the tape holds was overwritten since."""
        for t, version, _ in self._held:
            if t._version != version:
                raise TapeChangedError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place after its use was recorded; "
                    "the recorded derivative no longer belongs to it. Evaluate at the new point."
                )

    # --- replay -------------------------------------------------------------------------------------------------

    def stream(self, directions: Iterable[Tensor]) -> Iterator[tuple[int, Tensor | None]]:
        """Apply the recorded maps to ``directions``, one per input, each of the shape of that input.

        Yields:
            The number of an output and its imaginary part, in the order in which they are complete; None where it
            vanishes. It is not kept, and not to be changed.
        """
        assert self._replay is not None
        return self._replay.run(directions)

    def replay(self, directions: Iterable[Tensor]) -> list[Tensor | None]:
        """As :meth:`stream`: the imaginary parts of all outputs, in their order."""
        found: list[Tensor | None] = [None] * len(self._outputs)
        for number, change in self.stream(directions):
            found[number] = change
        return found


def _is_released(t: Tensor) -> bool:
    """Whether the storage of ``t`` has been resized to nothing, as reversible networks do with what they recompute."""
    if t.layout is not torch.strided or t.numel() == 0:
        return False
    return t.untyped_storage().nbytes() == 0 and HOLLOW not in t.untyped_storage().__dict__
