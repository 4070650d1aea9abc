"""How an evaluation comes to its result, noted so that it can be run again at other parameters.

A step evaluates its closure at several points on the same batch. What the first evaluation computes from the parameters
is noted operator by operator, below autograd; everything else, such as points drawn inside and functions of them, is a
constant. Memory is addressed as on a tape, by slots and windows, so that views need no steps.

Where code may look at a number that depends on the parameters and go another way, nothing can be run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from imstep.complexstep.false_gradients import SUSPECTS, refusal
from imstep.complexstep.gradients import PASSES, runs_functions
from imstep.complexstep.operations import Operation, Reference, tensors_in
from imstep.complexstep.registry import Signature
from imstep.complexstep.tensor import PLAIN, Window, parts
from imstep.curvature.outline import Noted, Outline, arranged, layout_of
from imstep.curvature.rerun import Rerun
from imstep.curvature.smooth import Kind, kind_of

_recordings = itertools.count()

_LOOKS = {
    *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__),
    *(Tensor.storage, Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.register_hook),
}
"""Ways to the memory of a tensor that lead past the operators; a number that is read is an operator."""

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

_LIBRARIES = ("aten", "prims")
"""Whose operators are functions of their arguments."""


_HUGE = 64.0
"""What a constant adds at least where it switches off an exponential or a hyperbolic tangent, as masks of scores do:
those of -inf and of -1e9, and of -100 in float32."""


class Keep(Enum):
    """What of a constant says which entry goes where."""

    NOTHING = 0
    ZEROS = 1
    VALUES = 2
    HUGE = 3


def _keep(t: Tensor, kind: Kind, of_parameters: bool) -> Keep:
    """What to keep of a constant among arguments that are parameters otherwise, or not."""
    if not (t.is_floating_point() or t.is_complex()):
        return Keep.VALUES
    if kind.adds:
        return Keep.HUGE
    return Keep.NOTHING if kind.multiplies and of_parameters else Keep.ZEROS


class Recording:
    """What an evaluation computes from the parameters, noted by :meth:`note` as it goes.

    Args:
        parameters: what will have other values.
        outline: of an earlier evaluation, which this one may repeat; None for none.

    Attributes:
        unfit: why it cannot be run again, a sentence; None while it can.
        form: of each operator the name, the arguments and where they come from: all but the numbers in tensors.
        fixed: constants that say which entry goes where: integers, and where factors have zeros and addends huge
            numbers; None for one that has none.
        smooth: whether the derivatives of all operators are finite wherever values are, and vanish nowhere in a region.
    """

    def __init__(self, parameters: Sequence[Tensor], outline: Outline | None = None) -> None:
        self._key = f"_imstep_slot_{next(_recordings)}"
        self._parameters = [p.detach() for p in parameters]
        self._windows: list[Window] = []
        self._steps: list[Operation] = []
        self._held: list[tuple[Tensor, int]] = []
        self.unfit: str | None = None
        self.form: list[Any] = []
        self.fixed: list[Tensor | None] = []
        self.smooth = True
        self._outline = outline if outline is not None and outline.fits(self._parameters) else None
        for p in self._parameters:
            if self._slot(p) is not None or not p.is_floating_point():
                self.unfit = "parameters share memory, or are complex"
            self._define(p)

    # --- noting -------------------------------------------------------------------------------------------------

    def note(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any, outputs: Any) -> None:
        """An operator was carried out; ``tensors`` are its arguments in the order of its signature."""
        if self.unfit is not None:
            return
        found = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        if self._outline is not None and self._foreseen(self._outline, func, args, kwargs, found):
            return
        if not self._concern(tensors) or any(isinstance(t, Tensor) and t.is_meta for t in found):
            return  # on the meta device: forward mode asks for the shape of a tangent that is zero
        kind = kind_of(func)
        if kind.of_windows and self._is_own(found[0]):
            return  # the same memory, which what follows is noted to look at as it is now
        if kind.of_shapes or (not sig.mutates and found and self._slot(found[0]) is not None):
            return  # another window, whatever the schema says
        self._outline = None
        with torch._C.DisableTorchFunction():
            self._judge(func, sig, tensors, found)
            self._keep_in_mind(kind, tensors_in(tensors))
            self.smooth = self.smooth and kind.smooth(args)
            step = Operation(func, [self._leaf(a) for a in args], {k: self._leaf(v) for k, v in kwargs.items()})
            if self.unfit is not None:
                return
            if sig.mutates:
                written = tensors_in([t for t, (*_, w) in zip(tensors, sig.tensors, strict=True) if w])
                step.writes = {self._slot(t) for t in written}  # type: ignore[misc]
            else:
                step.outputs = [self._output(t) for t in found]
                step.writes = {slot for slot in step.outputs if slot is not None}
        self._steps.append(step)
        keywords = [(k, _form(a)) for k, a in step.kwargs.items()]
        self.form.append((kind.name, [_form(a) for a in step.args], keywords))

    def _foreseen(self, outline: Outline, func: OpOverload, args: Any, kwargs: Any, found: Sequence[Any]) -> bool:
        """Whether an operator is the next of the outline; noted if so."""
        number = len(self._steps)
        noted = outline.noted[number] if number < len(outline.noted) else None
        if noted is None or noted.func is not func:
            return False
        with torch._C.DisableTorchFunction():
            constants = noted.constants(args, kwargs, found, self._key)
            if constants is None:
                return False
            for (_, t), keep in zip(constants, noted.keeps, strict=True):
                self._held.append((t, t._version))
                self._hold_in_mind(t, keep)
            step = noted.step.holding(constants)
            for slot, t in zip(step.outputs, found, strict=False):
                if slot is not None:
                    self._windows.append(outline.windows[slot])
                    t.untyped_storage().__dict__[self._key] = slot
        self._steps.append(step)
        self.form.append(noted.form)
        self.smooth = self.smooth and noted.smooth
        return True

    @property
    def repeated(self) -> bool:
        """Whether all was as in the outline."""
        return self._outline is not None and len(self._steps) == len(self._outline.noted)

    def outline(self) -> Outline:
        """What the next evaluation may repeat."""
        noted = []
        for step, form in zip(self._steps, self.form, strict=True):
            kind, plain = kind_of(step.func), all(slot < len(self._parameters) for slot in step.reads)
            keeps = lambda t, kind=kind, plain=plain: _keep(t, kind, plain)
            noted.append(Noted(step, self._windows, form, keeps, kind.smooth(step.args)))
        return Outline(self._parameters, self._windows, noted)

    def _concern(self, tensors: Iterable[Any]) -> bool:
        """Whether one depends on the parameters."""
        key = self._key
        for t in tensors:
            if t is None:
                continue
            if isinstance(t, Tensor):
                if t.layout is torch.strided and key in t.untyped_storage().__dict__:
                    return True
            elif self._concern(t):
                return True
        return False

    def _judge(self, func: OpOverload, sig: Signature, tensors: list[Any], found: Sequence[Any]) -> None:
        """Whether an operator can be run again."""
        if any(t is not None and not isinstance(t, Tensor) for t in found):
            self.unfit = f"{func} looks at a number"
        elif func.namespace not in _LIBRARIES or torch.Tag.nondeterministic_seeded in func.tags:
            self.unfit = f"{func} may come to something else"
        elif any(type(t) not in PLAIN for t in tensors_in([*tensors, *found])):
            self.unfit = "a tensor is of a class of its own"
        elif any(not self._is_own(t) for i in sig.overwritten for t in tensors_in([tensors[i]])):
            self.unfit = f"{func} writes into a parameter, or into what does not depend on any"

    def _keep_in_mind(self, kind: Kind, tensors: list[Tensor]) -> None:
        """Note which constants say what goes where."""
        slots = [self._slot(t) for t in tensors]
        of_parameters = all(slot is None or slot < len(self._parameters) for slot in slots)
        for t, slot in zip(tensors, slots, strict=True):
            if slot is None:
                self._hold_in_mind(t, _keep(t, kind, of_parameters))

    def _hold_in_mind(self, t: Tensor, keep: Keep) -> None:
        for part in [] if keep is Keep.NOTHING else map(Tensor.detach, parts(t)):
            if keep is Keep.VALUES or not (part.is_floating_point() or part.is_complex()):
                self.fixed.append(part.clone())
            else:
                noted = part == 0 if keep is Keep.ZEROS else part.abs() >= _HUGE
                self.fixed.append(noted if bool(noted.any()) else None)

    def _is_own(self, t: Tensor) -> bool:
        """Whether the memory of ``t`` is filled anew in each run."""
        slot = self._slot(t)
        return slot is not None and slot >= len(self._parameters)

    def _slot(self, t: Any) -> int | None:
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            return None
        return t.untyped_storage().__dict__.get(self._key)

    def _define(self, t: Tensor) -> int:
        self._windows.append(Window(t))
        t.untyped_storage().__dict__[self._key] = len(self._windows) - 1
        return len(self._windows) - 1

    def _output(self, t: Any) -> int | None:
        if t is None or t.layout is not torch.strided or self._slot(t) is not None:
            if t is not None:
                self.unfit = "an operator returns what it was given, or a tensor without strides"
            return None
        return self._define(t)

    def reference(self, t: Tensor) -> Any:
        """Where ``t`` is found when this runs again; itself where it is a constant."""
        slot = self._slot(t)
        if slot is not None:
            return Reference(slot, None if self._windows[slot].fits(t) else Window(t))
        if t.is_inference():
            self.unfit = "a constant comes from inference mode, which shows no changes"
        else:
            self._held.append((t, t._version))
        return t

    def _leaf(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.reference(a)
        if type(a) in (list, tuple) and any(isinstance(t, Tensor) for t in a):
            return [self._leaf(t) for t in a]
        return a

    # --- the end ------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Leave nothing behind on the parameters."""
        for p in self._parameters:
            p.untyped_storage().__dict__.pop(self._key, None)

    def finish(self, output: Tensor) -> Rerun | None:
        """What computes ``output`` at other parameters; None where nothing does."""
        end = self.reference(output)
        if self.unfit is not None or type(end) is not Reference:
            return None
        where, known = (self._steps, end.slot), self._outline if self.repeated else None
        at, dead = arranged(*where, len(self._parameters)) if known is None else known.arrangement(*where)
        kept = [self._steps[number] for number in at]
        held = {id(t) for step in kept for t in _constants([*step.args, *step.kwargs.values()])}
        constants = [(t, version) for t, version in self._held if id(t) in held]
        if any(t._version != version for t, version in constants):
            return None
        return Rerun(self._parameters, self._windows, kept, dead, constants, end)


class Looking(TorchFunctionMode):
    """Notes in a recording that code may have looked at numbers past the operators; refuses passes that are wrong.

    Args:
        recording: where to note it.
        moved: told of each tensor before it is given other memory.
    """

    def __init__(self, recording: Recording, moved: Callable[[Tensor], None] = lambda t: None) -> None:
        super().__init__()
        self._recording, self._moved = recording, moved

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            self._recording.unfit = f"{func.__name__} leads past the operators"
        elif func == _SET_DATA:
            self._recording.unfit = "a tensor is given other memory"
            self._moved(args[0])
        elif func in PASSES and runs_functions(tensors_in([*args[:1], *(kwargs or {}).values()])):
            self._recording.unfit = "what a Function looks at in its backward pass is out of sight"
        wrong = refusal(func, args, kwargs or {}) if func in PASSES or func in SUSPECTS else None
        if wrong is not None:
            raise wrong
        return func(*args, **(kwargs or {}))


def _constants(nested: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for a in nested:
        found += [a] if isinstance(a, Tensor) else _constants(a) if type(a) is list else []
    return found


def _form(a: Any) -> Any:
    """An argument without its numbers, to be compared."""
    if type(a) is Reference:
        w = a.window
        return a.slot, w and (w.size, w.stride, w.offset, w.dtype)
    if isinstance(a, Tensor):
        return a.shape, layout_of(a), a.dtype
    return tuple(_form(b) for b in a) if isinstance(a, (list, tuple)) else a
