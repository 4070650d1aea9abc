"""What a closure depends on besides the parameters: random numbers, and tensors that the model changes."""

from __future__ import annotations

import ctypes
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.generators import Generators
from imstep.complexstep.registry import FRESH, any_complex, conjugating, signature
from imstep.complexstep.scripted import unoptimised
from imstep.complexstep.tape import Tape
from imstep.curvature.parameters import CHANGED
from imstep.curvature.recording import Recording

_evaluations = itertools.count()


class RandomState:
    """The state of all global random number generators that a closure may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = NumpyState.now()
        self._torch = Generators([device])

    def restore(self) -> None:
        """Put the generators back to this state."""
        random.setstate(self._python)
        self._numpy.restore()
        self._torch.restore()


class NumpyState:
    """The state of NumPy's global generator, which takes 90 µs to read, and to write, and has rarely changed.

    Whether it has is told by the memory of the generator itself. Normal numbers come in pairs, of which the second is
    kept elsewhere: while there is one, the state is read and written each time.
    """

    _last: NumpyState | None = None

    def __init__(self) -> None:
        self._memory = _memory_of_numpy()
        self._state: Any = np.random.get_state(legacy=False)
        self._alone = not self._state.get("has_gauss", 1)

    @classmethod
    def now(cls) -> NumpyState:
        """As it is now."""
        last = cls._last
        if last is None or not last._stands():
            last = cls._last = cls()
        return last

    def _stands(self) -> bool:
        """Whether the generator is known to be in this state."""
        return self._alone and self._memory is not None and self._memory == _memory_of_numpy()

    def restore(self) -> None:
        """Put the generator back to this state."""
        if not self._stands():
            np.random.set_state(self._state)


def _memory_of_numpy() -> bytes | None:
    """What the Mersenne Twister behind NumPy's global generator holds; None for another one."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MERSENNE)


_MERSENNE = 625 * 4  # bytes: the key, and the place in it


class _Memory:
    """A storage that is overwritten in place."""

    def __init__(self, t: Tensor) -> None:
        with torch.inference_mode(False):  # there it could not be written to afterwards
            self.whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())

    def read(self) -> Tensor:
        """A copy of what it holds."""
        return self.whole.clone()

    def write(self, contents: Tensor) -> None:
        """Put ``contents`` in place of what it holds."""
        self.whole.copy_(contents)


class _Attribute:
    """A buffer of a module, or a parameter that is not trained, to which other tensors are assigned."""

    def __init__(self, tensors: dict[str, Any], name: str) -> None:
        self._tensors, self._name = tensors, name

    def read(self) -> Any:
        """The tensor."""
        return self._tensors[self._name]

    def write(self, t: Any) -> None:
        """Let ``t`` be the tensor."""
        self._tensors[self._name] = t


class _Data:
    """A tensor that is given other memory, as by ``t.data = ...``."""

    def __init__(self, t: Tensor) -> None:
        self._tensor = t

    def read(self) -> Tensor:
        """A tensor in the memory that it has."""
        return self._tensor.data

    def write(self, t: Tensor) -> None:
        """Give it the memory of ``t``."""
        self._tensor.data = t


class _Stream:
    """A generator of the user's."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def read(self) -> Tensor:
        """Its state."""
        return self._generator.get_state()

    def write(self, state: Tensor) -> None:
        """Put it in this state."""
        self._generator.set_state(state)


_Place: TypeAlias = _Memory | _Attribute | _Data | _Stream


@dataclass(frozen=True, eq=False)
class State:
    """What the closure changes, as it was at one time.

    Attributes:
        contents: by place.
        versions: of the tensors through which memory is overwritten.
    """

    contents: dict[Any, Any]
    versions: list[tuple[Tensor, int]]


class Writes:
    """What the closure changes beside the global generators: before and after the first evaluation.

    That is, tensors of the model that it overwrites or replaces, and generators of the user's that it draws from.

    Parameters are not among them, though a closure may overwrite them as well: an embedding with ``max_norm`` does.

    Tapes and autograd's graphs hold some of these tensors, and tell by their versions whether they are as they were. So
    versions are put back with the contents: evaluations of the same parameters come to the same versions.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self._before: dict[Any, tuple[_Place, Any]] = {}
        self._after: State | None = None
        self._tapes: list[WeakSet[Tape]] = []
        self._written: dict[int, tuple[Tensor, int]] = {}  # tensors that memory is overwritten through, and versions

    def before(self, t: Tensor | torch.Generator, moved: bool = False) -> None:
        """Note a generator, or the whole storage of a tensor, that is about to change, unless it is known.

        Args:
            moved: whether a tensor is about to be given other memory, in place of other contents.
        """
        if isinstance(t, torch.Generator):
            if id(t) not in self._before:
                self._note(id(t), _Stream(t))
            return
        if moved and (is_lazy(t) or t.layout is not torch.strided or not t.is_leaf):
            return
        key = t.untyped_storage()._cdata
        if key in self._parameters:
            return
        if moved:
            if id(t) not in self._before:
                self._note(id(t), _Data(t))
            return
        if key not in self._before:
            self._note(key, _Memory(t))
        if not t.is_inference():
            self._written.setdefault(id(t), (t, t._version))

    @contextmanager
    def noting_assignments(self) -> Iterator[None]:
        """A context in which modules tell of the tensors that are assigned to them, as in ``self.mean = mean``."""
        handles = (
            register_module_buffer_registration_hook(lambda m, name, _: self._assigned(m._buffers, name)),
            register_module_parameter_registration_hook(lambda m, name, _: self._assigned(m._parameters, name)),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _assigned(self, tensors: dict[str, Any], name: str) -> None:
        t, key = tensors.get(name), (id(tensors), name)
        if isinstance(t, nn.Parameter) and not is_lazy(t) and t.untyped_storage()._cdata in self._parameters:
            raise ValueError(CHANGED)
        if name in tensors and key not in self._before:  # a new one is a cache
            self._note(key, _Attribute(tensors, name))

    def _note(self, key: Any, place: _Place) -> None:
        self._before[key] = place, place.read()

    def keep(self) -> None:
        """Remember the state after the first evaluation: the one that stays."""
        self._after = self.state()

    def state(self) -> State:
        """As all is now."""
        contents = {key: place.read() for key, (place, _) in self._before.items()}
        return State(contents, [(t, t._version) for t, _ in self._written.values()])

    def replace(self, state: State) -> None:
        """Put a state back; what was not known to be changed then is as before the first evaluation."""
        self._put(state.contents, state.versions)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """A context after which all is as it is now."""
        now = self.state()
        try:
            yield
        finally:
            self.replace(now)

    def rewind(self) -> None:
        """Put everything back to what it was before the first evaluation."""
        self._put({}, [])

    def finish(self, accepted: bool) -> None:
        """Leave all as after one evaluation, or as before it."""
        if accepted and self._after is not None:
            self.replace(self._after)
            return
        for tape in [tape for kin in self._tapes for tape in kin]:  # what is kept of it goes on with copies
            for place, _ in self._before.values():
                if isinstance(place, _Memory):
                    tape.protect(place.whole)
        self.rewind()

    def follow(self, tape: Tape) -> None:
        """Let a tape of an evaluation keep what it has read, where that is put back to before it."""
        self._tapes.append(tape.kin)

    def _put(self, contents: dict[Any, Any], versions: list[tuple[Tensor, int]]) -> None:
        for key, (place, saved) in self._before.items():
            place.write(contents.get(key, saved))
        # Several may have one counter, whose value was the lowest when the first of them was noted.
        for t, version in [*reversed(self._written.values()), *versions]:
            torch._C._autograd._unsafe_set_version_counter((t,), (version,))


class WriteWatch(TorchDispatchMode):
    """Notes what an evaluation overwrites that existed before it; compiled code runs uncompiled, in sight of it.

    Args:
        writes: where to note it.
        recording: where to note what is computed from the parameters; None for nowhere.
    """

    supports_higher_order_operators = True  # to refuse them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every operator the wrapper that keeps PyTorch's compiler out of a mode."""
        return False

    def __init__(self, writes: Writes, recording: Recording | None = None) -> None:
        super().__init__()
        self._writes, self._born = writes, f"_imstep_born_{next(_evaluations)}"
        self._recording = recording
        self._stack = ExitStack()

    def __enter__(self) -> WriteWatch:
        if "torch._dynamo" in sys.modules:
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(unoptimised())
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sig, kwargs = signature(func), kwargs or {}
        if sig.window and isinstance(args[0], Tensor) and not args[0].is_complex():
            outputs = func(*args, **kwargs)  # another window onto the same memory
            if func is FRESH:
                self._mark(outputs)
            return outputs
        if self._recording is not None and sig.collective:  # what autograd makes of it would be wrong
            raise UnsupportedOperatorError(
                func,
                "least squares takes the residuals of each process by itself, and evaluates them there as often as it "
                "needs.",
                "Let the closure return the loss of its own process's part of the batch, do exchanges outside of it, "
                "and give process_group= to LeastSquares, which joins the parts.",
            )
        tensors = sig.gather(args, kwargs)
        for at in sig.overwritten:
            self._note(tensors[at])
        if kwargs.get("generator") is not None:
            self._writes.before(kwargs["generator"])
        outputs = conjugating(func, args, kwargs) if any_complex(tensors) else func(*args, **kwargs)
        if sig.mutates:
            sig.count_writes(tensors)
        elif not sig.view:
            self._mark(outputs)
        if self._recording is not None:
            self._recording.note(func, sig, tensors, args, kwargs, outputs)
        return outputs

    def moved(self, t: Tensor) -> None:
        """Note that a tensor is about to be given other memory, as by ``t.data = ...``, which is no operator."""
        self._writes.before(t, moved=True)

    def _note(self, t: Any) -> None:
        for u in t if isinstance(t, (list, tuple)) else [t]:
            strided = isinstance(u, Tensor) and u.layout is torch.strided
            if strided and self._born not in u.untyped_storage().__dict__:
                self._writes.before(u)

    def _mark(self, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            if outputs.layout is torch.strided:
                outputs.untyped_storage().__dict__.setdefault(self._born, True)
        elif isinstance(outputs, (list, tuple)):
            for output in outputs:
                self._mark(output)
