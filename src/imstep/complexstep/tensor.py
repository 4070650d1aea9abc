"""The number re + i·h·im: a real tensor, and an imaginary part that lies beside its memory.

Every strided tensor is a window (size, stride, offset) onto a storage. A complex-step number keeps its
imaginary part in a second storage of the same layout, attached to the first. Three things follow:

* views, transposes, slices and ``expand`` need no rule: the same window onto the second storage is their
  imaginary part, and a write through any view is seen by all;
* ``re`` stays the user's own tensor: parameters, buffers, hooks and ``.grad`` need no substitution, and nothing
  has to be put back when a closure raises;
* the imaginary part lives exactly as long as the storage, also inside autograd's saved tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_points = itertools.count()
_OWNED = "_imstep_imaginary_of_another"

HOLLOW = "_imstep_hollow"
"""Beside storages whose memory is given back while nothing looks at it, and filled again: how many bytes they have."""

PLAIN = {Tensor, torch.nn.Parameter}
"""Classes of tensors that add nothing of their own; others are subclasses of the user's."""


@dataclass(frozen=True)
class ComplexStepTensor:
    """The value ``re + i·h·im`` as a pair of real tensors of one shape; ``im`` is None where it vanishes."""

    re: Tensor
    im: Tensor | None = None

    @property
    def imaginary(self) -> Tensor:
        """The imaginary part, with zeros made explicit; shape of ``re``."""
        return torch.zeros_like(self.re) if self.im is None else self.im


class Window:
    """How a tensor looks onto its storage: what is needed to look onto another one in the same way."""

    __slots__ = ("conj", "dtype", "neg", "offset", "size", "stride")

    def __init__(self, t: Tensor) -> None:
        self.size, self.stride, self.offset = t.shape, t.stride(), t.storage_offset()
        self.dtype, self.conj, self.neg = t.dtype, t.is_conj(), t.is_neg()

    def fits(self, t: Tensor) -> bool:
        """Whether ``t`` already is this window onto its own storage."""
        return (
            t.shape == self.size
            and t.stride() == self.stride
            and t.storage_offset() == self.offset
            and t.dtype is self.dtype
            and t.is_neg() == self.neg
            and (t.is_conj() if self.dtype.is_complex else False) == self.conj
        )

    def same(self, other: Window) -> bool:
        """Whether both look onto a storage in one way."""
        return (
            self.size == other.size
            and self.stride == other.stride
            and self.offset == other.offset
            and self.dtype is other.dtype
            and self.conj == other.conj
            and self.neg == other.neg
        )

    def onto(self, base: Tensor, shift: int = 0, negated: bool = True) -> Tensor:
        """This window onto the storage of ``base``, moved by ``shift`` entries.

        Under ``vmap`` what shows numbers negated is a copy; to write to it, ask for them as they are (not ``negated``).
        """
        if shift == 0 and self.fits(base):
            return base
        base = base.conj() if base.is_conj() else base  # the memory itself
        base = torch._neg_view(base) if base.is_neg() else base
        if base.dtype is self.dtype:
            t = base.as_strided(self.size, self.stride, self.offset + shift)
        elif base.is_complex() and not self.dtype.is_complex:
            t = torch.view_as_real(base).as_strided(self.size, self.stride, self.offset + 2 * shift)
        elif self.dtype.is_complex and not base.is_complex():
            if 0 in self.size:  # it may begin behind the end
                return base.new_empty(self.size, dtype=self.dtype)
            pairs = base.as_strided((self._end(), 2), (2, 1), shift)
            # Nothing that is written to lies at odd places: see Replay._laid_out.
            pairs = torch.view_as_complex(pairs if _at_even_places(pairs) else pairs.clone())
            t = pairs.as_strided(self.size, self.stride, self.offset + pairs.storage_offset())
        else:
            t = torch.empty(0, dtype=self.dtype, device=base.device)
            t.set_(base.untyped_storage(), self.offset + shift, self.size, self.stride)
        t = t.conj() if self.conj else t
        if not (self.neg and negated):
            return t
        return t.neg() if torch._C._functorch.is_batchedtensor(t) else torch._neg_view(t)

    def _end(self) -> int:
        """One more than the last entry of the storage that the window shows."""
        return int(self.offset) + 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


def hollow(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose memory comes and goes, with that of all views of it."""
    t = torch.empty(shape, dtype=dtype, device=device)
    storage = t.untyped_storage()
    storage.__dict__[HOLLOW] = storage.nbytes()
    storage.resize_(0)
    return t


def entries_behind(t: Tensor) -> int:
    """How many entries the storage of ``t`` has, or has when it is not hollow."""
    storage = t.untyped_storage()
    bytes_: int = storage.nbytes() or storage.__dict__.get(HOLLOW, 0)
    return bytes_ // t.element_size()


def parts(t: Tensor) -> list[Tensor]:
    """The tensors with strides that hold ``t``: itself, or indices and values of a sparse one."""
    if t.layout is torch.strided:
        return [t]
    if t.layout is torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return []


class Plane:
    """All imaginary parts of one evaluation; parts of another plane are invisible to it.

    What is attached to a storage is a tensor that begins where memory laid out like it does or, while a tape is
    recorded, the number of a slot on the tape.
    """

    def __init__(self) -> None:
        number = next(_points)
        self._key, self._constant = f"_imstep_imaginary_{number}", f"_imstep_constant_{number}"
        self._copies = f"_imstep_copies_{number}"
        self.open = False  # whether its evaluation is under way

    def find(self, t: Tensor) -> Any:
        """What is attached to the storage of ``t``, whole; None where there is nothing."""
        if t.layout is not torch.strided:
            return None
        return t.untyped_storage().__dict__.get(self._key)

    def attached(self, tensors: Sequence[Any]) -> list[Any] | None:
        """What is attached to each tensor, nested as they are; None where nothing is attached to any."""
        found, live = [], False
        for t in tensors:
            held = None
            if t is not None:
                held = self.attached(t) if isinstance(t, (list, tuple)) else self.find(t)
                live = live or held is not None
            found.append(held)
        return found if live else None

    def get(self, t: Tensor) -> Tensor | None:
        """The imaginary part of ``t``: a view of the attached memory, shape of ``t``."""
        base = self.find(t)
        return None if base is None else Window(t).onto(base, base.storage_offset())

    def interchangeable(self, t: Tensor, other: Tensor) -> bool:
        """Whether two tensors fill different storages in the same way, so that one's imaginary part suits the other."""
        storage, others = t.untyped_storage(), other.untyped_storage()
        return (
            storage.nbytes() == others.nbytes() == t.numel() * t.element_size()
            and storage._cdata != others._cdata
            and Window(t).fits(other)
        )

    def hand_over(self, source: Tensor, target: Tensor) -> None:
        """Give what is attached to the storage of ``source``, which is used no more, to that of ``target``."""
        held = source.untyped_storage().__dict__.pop(self._key, None)
        if held is None:
            self.drop(target)
        else:
            target.untyped_storage().__dict__[self._key] = held

    def name(self, t: Tensor, slot: int) -> None:
        """Attach the number of a slot to the storage of ``t``."""
        t.untyped_storage().__dict__[self._key] = slot

    def named(self, t: Tensor, define: Callable[[Tensor], int]) -> int | None:
        """As :meth:`name`, with the number that ``define`` gives; None where something is attached already."""
        beside = t.untyped_storage().__dict__
        if self._key in beside:
            return None
        slot = beside[self._key] = define(t)
        return slot

    def put(self, t: Tensor, im: Tensor) -> Tensor:
        """Attach ``im`` to the fresh tensor ``t``; takes the memory of ``im`` over unless something shares it."""
        storage = t.untyped_storage()
        held = im.untyped_storage()
        if (
            im.shape != t.shape
            or im.stride() != t.stride()
            or im.storage_offset() != 0
            or t.storage_offset() != 0
            or im.dtype is not t.dtype
            or held.nbytes() < storage.nbytes()
            or _OWNED in held.__dict__
            or held is storage
            or im.is_conj() != t.is_conj()
            or im.is_neg() != t.is_neg()
        ):
            base = mirror(t)
            Window(t).onto(base).copy_(im)
            im, held = base, base.untyped_storage()
        held.__dict__[_OWNED] = True
        storage.__dict__[self._key] = im
        return im

    def lend(self, t: Tensor, im: Tensor) -> bool:
        """Attach ``im`` itself, which may be part of a larger vector, to ``t``; False where their layouts differ."""
        whole_storage = t.is_contiguous() and entries_behind(t) == t.numel()
        even = im.storage_offset() % 2 == 0  # as a complex view asks for
        plain = not any(u.is_conj() or u.is_neg() for u in (t, im))
        if not (whole_storage and even and plain and im.is_contiguous() and im.dtype is t.dtype):
            return False
        im.untyped_storage().__dict__[_OWNED] = True
        t.untyped_storage().__dict__[self._key] = im
        return True

    def write(self, t: Tensor, im: Tensor | None) -> None:
        """Overwrite the imaginary part of ``t`` in place, as after an in-place operator; None stands for zero."""
        base = self.find(t)
        if base is None:
            if im is None:
                return
            base = self.put(t, torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape))
        window = Window(t).onto(base, base.storage_offset())
        if im is None:
            window.zero_()
        else:
            window.copy_(im)

    def extend(self, t: Tensor, before: Tensor) -> None:
        """Let what is attached to the storage of ``t``, once as large as ``before`` shows, fill it as it is now."""
        im = Window(before).onto(self.find(t), self.find(t).storage_offset())
        base = mirror(t)
        Window(before).onto(base).copy_(im)
        base.untyped_storage().__dict__[_OWNED] = True
        t.untyped_storage().__dict__[self._key] = base

    def constant(self, t: Tensor) -> Tensor:
        """A copy of ``t`` without imaginary part, to stand for a detached view of it."""
        copy, source = t.clone(), t.untyped_storage()
        copy.untyped_storage().__dict__[self._constant] = StorageWeakRef(source)
        source.__dict__.setdefault(self._copies, []).append((Window(t), copy.view(copy.shape)))
        return copy

    def is_constant(self, t: Tensor) -> bool:
        """Whether ``t`` is a copy standing for a view of memory that is still there, so that writing would be lost."""
        source = t.untyped_storage().__dict__.get(self._constant) if t.layout is torch.strided else None
        return source is not None and not source.expired()

    def renew(self, t: Tensor, before: Callable[[Tensor], None]) -> None:
        """Let copies that stand for detached views show what the memory of ``t`` holds now; ``before`` each write."""
        if t.layout is torch.strided:
            for window, copy in t.untyped_storage().__dict__.get(self._copies, ()):
                shown = window.onto(t)
                if not torch.equal(copy, shown):
                    before(copy)
                    copy.copy_(shown)

    def drop(self, t: Tensor) -> None:
        """Forget the imaginary part of the storage of ``t``."""
        if t.layout is torch.strided:
            t.untyped_storage().__dict__.pop(self._key, None)

    def forget(self, t: Tensor) -> None:
        """Forget all about the storage of ``t``, which outlives the evaluation."""
        self.drop(t)
        if t.layout is torch.strided:
            t.untyped_storage().__dict__.pop(self._copies, None)


def _at_even_places(pairs: Tensor) -> bool:
    """Whether pairs of reals begin where complex numbers can, under ``vmap`` those of every direction."""
    while torch._C._functorch.is_batchedtensor(pairs):
        along = torch._C._functorch.maybe_get_bdim(pairs)
        pairs = torch._C._functorch.get_unwrapped(pairs)
        if pairs.stride(along) % 2:
            return False
    return pairs.storage_offset() % 2 == 0


def whole(t: Tensor) -> Tensor:
    """All of the storage of ``t`` as one dimension."""
    entries = t.untyped_storage().nbytes() // t.element_size()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), 0, (entries,), (1,))


def mirror(t: Tensor) -> Tensor:
    """Zeroed memory laid out like the whole storage of ``t``, not only the part that ``t`` shows."""
    return torch.zeros(entries_behind(t), dtype=t.dtype, device=t.device)
