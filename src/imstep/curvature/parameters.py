"""Between a model's parameters and flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imstep.complexstep.islands import unseen
from imstep.curvature.apart import check_apart, check_others
from imstep.linalg.space import Space

if TYPE_CHECKING:
    from imstep.curvature.processes import Processes


CHANGED = (
    "closure changed the parameters: an optimizer's step, an average or a constraint in it. Only the optimizer may "
    "move them between evaluations. Do it outside the closure, after the step."
)
"""What is said where that is noticed."""


class TensorVector:
    """Tensors of given forms seen as one real vector of shape (n,): concatenated in order, each in row-major order.

    An entry a + bi of a complex tensor stands in it as the pair a, b. The gradient of a real function as autograd has
    it, ∂f/∂a + i ∂f/∂b, then stands in it as the gradient with respect to that pair.

    Args:
        forms: shape and dtype of each tensor.
        dtype: of the vector.
        device: of all.

    Attributes:
        sizes: how many entries of the vector each tensor takes.
        size: n.
    """

    def __init__(
        self, forms: Sequence[tuple[torch.Size, torch.dtype]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.forms, self.dtype, self.device = list(forms), dtype, device
        self._shapes = [torch.Size([*shape, 2]) if kind.is_complex else shape for shape, kind in forms]
        self.sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self.sizes)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector (n,) from one tensor per part, complex or as pairs of reals; None stands for zeros."""
        empty = lambda n: torch.zeros(n, dtype=self.dtype, device=self.device)
        with unseen():  # to leave autograd's graph is no cut of an arithmetic around this
            parts = [
                empty(n) if t is None else as_reals(t.detach()).reshape(-1).to(self.dtype)
                for t, n in zip(tensors, self.sizes, strict=True)
            ]
            return torch.cat(parts)

    def checked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors, one per part, each of its shape.

        Raises:
            TypeError: they are not all tensors.
            ValueError: they are more or fewer, or one has another shape.
        """
        if not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError("a list to multiply holds tensors, one for each parameter. Pass [t for t in ...].")
        shapes, wanted = [t.shape for t in tensors], [shape for shape, _ in self.forms]
        if shapes != wanted:
            show = lambda sizes: ", ".join(str(tuple(s)) for s in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
            raise ValueError(
                f"a list to multiply holds {len(wanted)} tensors of shapes {show(wanted)}; got {len(shapes)} of shapes "
                f"{show(shapes)}. Pass one for each parameter that requires a gradient, in order."
            )
        return tensors

    def views(self, vector: Tensor) -> list[Tensor]:
        """Real views of ``vector`` (n,), one per part, in its shape; with a last dimension of 2 for a complex one."""
        parts = vector.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """The parts of ``vector`` (n,), in shape and dtype; views of it where they are real and of its dtype."""
        return [
            torch.complex(part[..., 0], part[..., 1]).to(dtype) if dtype.is_complex else part.to(dtype)
            for part, (_, dtype) in zip(self.views(vector), self.forms, strict=True)
        ]

    def assembled(self, parts: Iterable[tuple[int, Tensor | None]], like: Tensor) -> Tensor:
        """The vector (n,) from its parts, by number, which may come in any order; None stands for zeros.

        Args:
            like: what they were made of.
        """
        parts = iter(parts)
        # While the first parts come, what they are made of takes the most memory: the vector is made later.
        early = _until(parts, self.size // 2)
        vector = like.new_empty(self.size, dtype=self.dtype)
        self.write(early, vector)
        early.clear()
        return self.write(parts, vector)

    def write(self, parts: Iterable[tuple[int, Tensor | None]], vector: Tensor) -> Tensor:
        """Write parts over those of ``vector`` (n,) as they come, so that none is kept beside it."""
        views = self.views(vector)
        for number, part in parts:
            if part is None:
                views[number].zero_()
            else:
                views[number].copy_(as_reals(part))
        return vector

    def weighing(self, weight: float) -> AbstractContextManager[None]:
        """A context in which what is made counts so much; for vectors that are summed as they are made."""
        return nullcontext()

    def weigh_piece(self, weight: float) -> None:
        """What is made from now on is of a piece of a batch, which counts so much within :meth:`weighing`."""

    def part(self, positions: Sequence[int]) -> TensorVector:
        """The vector of some of the tensors."""
        return TensorVector([self.forms[at] for at in positions], self.dtype, self.device)

    def entries(self, positions: Sequence[int]) -> Tensor:
        """Where the entries of some of the tensors are, in the order of :meth:`part`."""
        places = torch.arange(self.size, device=self.device).split(self.sizes)
        return torch.cat([places[at] for at in positions])

    @property
    def space(self) -> Space:
        """What operators take lists of tensors by."""
        return self

    def places(self, by: str) -> dict[str, Tensor]:
        """The entries of each layer's or parameter's tensors, by name."""
        raise ValueError(f"by={by!r} needs the parameters of a model; these vectors are something else.")


def _until(parts: Iterable[tuple[int, Tensor | None]], entries: int) -> list[tuple[int, Tensor | None]]:
    """The first of ``parts``, as many as have ``entries`` together."""
    found = []
    for number, part in parts:
        found.append((number, part))
        entries -= 0 if part is None else part.numel()
        if entries < 0:
            break
    return found


class ParameterVector(TensorVector):
    """Parameters seen as one real vector of shape (n,): concatenated in order, each in row-major order.

    The vector's dtype is float64 if a parameter is (or complex128), else float32; parameters of half precision are
    converted at the edge. A complex parameter stands in it as pairs of reals, see :class:`TensorVector`. Parameters
    that do not require gradients are frozen and not part of the vector.

    Args:
        params: a module, or an iterable of parameters; a parameter that appears twice counts once.
        processes: that hold the same parameters, and add up what they find of their parts of a batch; None for one.

    Raises:
        ValueError: no parameter requires gradients, they live on several devices, or two share memory.
        TypeError: a parameter is sparse, or ``params`` is no module or iterable of tensors.

    Attributes:
        tensors: the parameters, in order.
        names: of each, in the module; its place among those given where there is none.
        processes: as given.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> ParameterVector(layer).size
        3
    """

    def __init__(self, params: nn.Module | Iterable[Tensor], processes: Processes | None = None) -> None:
        self.processes = processes
        if isinstance(params, Tensor):
            raise TypeError("parameters must be a module or an iterable of tensors, got one tensor. Pass [tensor].")
        self._named = isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            named: list[tuple[str, Tensor]] = list(params.named_parameters())
        else:
            named = [(str(at), p) for at, p in enumerate(params)]
        names = {id(p): name for name, p in reversed(named)}
        candidates = [p for _, p in named]
        for p in candidates:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameters must be tensors, got {type(p).__name__}. Pass a module or model.parameters()."
                )
        self.tensors = list({id(p): p for p in candidates if p.requires_grad}.values())
        if not self.tensors:
            raise ValueError(
                "there is no parameter to differentiate: "
                + ("none was given." if not candidates else f"all {len(candidates)} have requires_grad=False.")
            )
        self.names = [names[id(p)] for p in self.tensors]
        _check(self.tensors)
        check_apart(self.tensors, self.names)
        check_others([p for p in candidates if not p.requires_grad], self.tensors, self.names)
        double = (torch.float64, torch.complex128)
        dtype = torch.float64 if any(p.dtype in double for p in self.tensors) else torch.float32
        super().__init__([(p.shape, p.dtype) for p in self.tensors], dtype, self.tensors[0].device)

    def positions(self, params: nn.Module | Iterable[Tensor]) -> list[int]:
        """Where some of the parameters stand among all; those that are frozen are left out.

        Raises:
            ValueError: one is not among them.
        """
        place = {id(p): at for at, p in enumerate(self.tensors)}
        wanted = ParameterVector(params).tensors
        unknown = sum(id(p) not in place for p in wanted)
        if unknown:
            raise ValueError(
                f"{unknown} of the {len(wanted)} parameters of the block are not among those of the operator. "
                "Pass parameters that the operator was built with."
            )
        return [place[id(p)] for p in wanted]

    def part(self, positions: Sequence[int]) -> ParameterVector:
        """The vector of some of the parameters, of the same dtype."""
        own = ParameterVector.__new__(ParameterVector)
        TensorVector.__init__(own, [self.forms[at] for at in positions], self.dtype, self.device)
        own.tensors, own.names = [self.tensors[at] for at in positions], [self.names[at] for at in positions]
        own._named, own.processes = self._named, self.processes
        return own

    def groups(self, by: str) -> dict[str, list[Tensor]]:
        """The parameters of each layer, or each by itself, by name.

        Args:
            by: "layer" for those of one module together, or "parameter".

        Raises:
            ValueError: another word; layers of parameters that were given without their module.
        """
        if by not in ("layer", "parameter"):
            raise ValueError(f"by is 'layer' or 'parameter', got {by!r}. For other groups use A.block(parameters).")
        if by == "layer" and not self._named:
            raise ValueError(
                "by='layer' needs the names of the layers, and the operator was built from a list of parameters. Build "
                "it with the module in their place, or pass by='parameter'."
            )
        groups: dict[str, list[Tensor]] = {}
        for name, p in zip(self.names, self.tensors, strict=True):
            # A parameter of the model itself, which has no name, is a layer of its own.
            groups.setdefault(name.rpartition(".")[0] or name if by == "layer" else name, []).append(p)
        return groups

    def places(self, by: str) -> dict[str, Tensor]:
        return {name: self.entries(self.positions(own)) for name, own in self.groups(by).items()}

    def spread(self, values: Sequence[float]) -> Tensor:
        """A vector (n,) from one number for each parameter."""
        sizes = torch.tensor(self.sizes, device=self.device)
        return torch.tensor(values, dtype=self.dtype, device=self.device).repeat_interleave(sizes)

    # --- what processes hold, and what they evaluate ------------------------------------------------------------

    @property
    def evaluated(self) -> ParameterVector:
        """What a closure sees in their place, and its records are of: themselves, unless they are sharded."""
        return self

    @property
    def blockwise(self) -> bool:
        """Whether there is room for products with several vectors at once."""
        return True

    @property
    def replicated(self) -> list[Tensor]:
        """Those that all processes hold alike."""
        return self.tensors

    @property
    def memory(self) -> list[Tensor]:
        """What of each parameter is held here."""
        return self.tensors

    def shown(self) -> AbstractContextManager[None]:
        """A context in which :attr:`evaluated` has memory, and modules hold it; all processes enter it together."""
        return nullcontext()

    def keep(self) -> None:
        """Leave :attr:`evaluated` its memory after :meth:`shown`, for records that refer to it."""

    def refresh(self) -> None:
        """Have :attr:`evaluated` hold what the parameters do now; all processes call this together."""

    def own(self, vector: Tensor) -> Tensor:
        """A vector (..., n) that is the same in all processes, as it is kept here."""
        return vector

    def whole(self, vector: Tensor) -> Tensor:
        """The inverse of :meth:`own`, for :attr:`evaluated`; all processes call this together."""
        return vector

    def along(self, vector: Tensor) -> AbstractContextManager[Tensor]:
        """A context for products with a vector (..., n), and how :attr:`evaluated` takes it; all enter it together."""
        return nullcontext(vector)

    def looked_at(self) -> AbstractContextManager[None]:
        """A context for the user's code."""
        return nullcontext()

    def taking_gradients(self) -> AbstractContextManager[None]:
        """A context in which gradients of :attr:`evaluated` are summed over processes as they are made, if they can be.
        """
        return nullcontext()

    def taken(self, note: Callable[[int, Tensor], None]) -> AbstractContextManager[list[bool]]:
        """A context for a backward pass to the parameters, whose gradients are taken away if that is asked for.

        Args:
            note: called with the number and the gradient of each before.

        Returns:
            By parameter, whether its gradient was taken; empty where none is.
        """
        return nullcontext([])

    def gathered(self, vector: Tensor) -> Tensor:
        """A vector as it is taken by what works on whole ones, in a process's part of an evaluation."""
        return vector

    def summed(
        self, part: Callable[[], Tensor | None], numbers: int, vectors: int = 0, direction: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sums over processes of numbers and of vectors, (numbers,) and (vectors, n), of what each finds.

        Args:
            part: what this process adds, (numbers + vectors n,), or numbers alone if vectors are summed as they are
                made; see :meth:`Processes.sum`.
            direction: what all must have the same of.
        """
        assert self.processes is not None
        found = self.processes.sum(part, numbers + vectors * self.size, self, direction)
        return found[:numbers], found[numbers:].view(vectors, self.size)

    def gradients(self, vector: Tensor) -> list[Tensor]:
        """A vector (n,) in memory of its own as ``.grad`` of each parameter."""
        return [g.clone() for g in self.unflatten(vector)]

    # --- their values -------------------------------------------------------------------------------------------

    def get(self) -> Tensor:
        """A copy of the parameters as a vector (n,)."""
        return self.flatten(self.memory)

    def snapshot(self) -> list[Tensor]:
        """Copies of the parameters in their own dtypes, to restore them bit for bit."""
        return [p.detach().clone() for p in self.memory]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Set the parameters to a snapshot."""
        torch.clear_autocast_cache()  # copies of other values, also after an exception
        with torch.no_grad():
            for p, saved in zip(self.memory, snapshot, strict=True):
                p.copy_(saved)
        self._moved()

    def set(self, vector: Tensor) -> None:
        """Set the parameters to a vector (n,)."""
        self.restore(self.unflatten(vector))

    def norm(self) -> float:
        """Of the vector, in double precision whatever the dtypes."""
        reals = [as_reals(p.detach()) for p in self.tensors]
        norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in reals])
        return float(torch.linalg.vector_norm(norms))

    def move(self, snapshot: Sequence[Tensor], direction: Tensor, step_length: float) -> None:
        """Set the parameters to snapshot + step_length * direction, with ``direction`` (n,)."""
        torch.clear_autocast_cache()
        with torch.no_grad():
            for p, saved, d in zip(self.memory, snapshot, self.unflatten(direction), strict=True):
                torch.add(saved, d, alpha=step_length, out=p)
        self._moved()

    def _moved(self) -> None:
        """The parameters have other values."""


def as_reals(t: Tensor) -> Tensor:
    """``t``, a complex one as pairs of reals in a last dimension."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _check(tensors: Sequence[Tensor]) -> None:
    for p in tensors:
        if p.layout is not torch.strided:
            raise TypeError(f"a parameter has layout {p.layout}; only dense (strided) parameters are supported.")
    devices = sorted({str(p.device) for p in tensors})
    if len(devices) > 1:
        raise ValueError(f"parameters live on several devices ({', '.join(devices)}). Move the model to one device.")
