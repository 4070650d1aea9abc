"""A root that vanishes somewhere: which operator took it of what, and what has become of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.errors import user_place
from imstep.complexstep.registry import signature
from imstep.complexstep.rules.piecewise import expanded

aten = torch.ops.aten

_NORMS = (aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
_ROWS = (aten._cdist_forward.default, aten._pdist_forward.default)
_PAIRS = (*_ROWS, aten.dist.default)
_DEVIATIONS = (aten.std.correction, aten.std_mean.correction)
EUCLIDEAN, ABSOLUTE = aten._euclidean_dist.default, aten.abs.default
ROOTS = {id(op) for op in (*_NORMS, *_PAIRS, *_DEVIATIONS, EUCLIDEAN, ABSOLUTE)}
"""Operators that take a root, by identity."""


@dataclass(eq=False)
class Root:
    """A root that vanishes somewhere.

    Attributes:
        operator: that took it.
        place: where in the user's code: file, line and the registry of warnings; None if unknown.
        round: whether it is the Euclidean norm of something: phi(n) is smooth if phi is even.
        edged: whether it has edges elsewhere, too, as an absolute value has: taken as PyTorch takes them, and no news.
        apply: the operator as a function of its tensors.
        vanishes: where it is zero.
        seed: the first of the numbers that stand for its entries; it is the same root where it is taken again.
        moves: whether the direction leads away from where it vanishes; None while that is not known.
        references: what it was taken of, on a tape.
        arrived: the weighted sum of what has arrived in the backward pass where it vanishes, and that of magnitudes.
        lost: whether it leaves the result without a derivative.
        branched: whether it is a magnitude for which the number itself stands, or its negative.
    """

    operator: OpOverload
    place: Any
    round: bool
    edged: bool
    apply: Callable[[Sequence[Any]], Tensor]
    vanishes: Tensor
    seed: int
    moves: bool | None = None
    references: list[Any] = field(default_factory=list)
    arrived: tuple[Any, Any] = (0.0, 0.0)
    lost: bool = False
    branched: bool = False

    def receive(self, gradient: Tensor, weights: Tensor) -> None:
        """Count what arrives where it vanishes; edges of a root that is taken more than once may cancel."""
        total, size = self.arrived
        self.arrived = total + (gradient * weights).sum(), size + (gradient * weights).abs().sum()

    def has_edge(self) -> bool:
        """Whether what has arrived leaves an edge that PyTorch has not."""
        total, size = self.arrived
        if self.edged or not isinstance(size, Tensor):
            return False
        return bool(total.abs() > 10 * torch.finfo(size.dtype).eps * size)

    def look(self, ims: Sequence[Any]) -> None:
        """Find out whether the direction moves it; of the first order it is then the root of the direction."""
        self.moves = bool(((self.apply(ims) != 0) & self.vanishes).any())


def root_of(func: OpOverload, args: Any, kwargs: Any, value: Tensor, seed: int) -> Root:
    """The root ``value`` that ``func`` has taken of its arguments."""
    sig = signature(func)
    tensors = sig.gather(args, kwargs)

    def apply(parts: Sequence[Any]) -> Tensor:
        given = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, parts, strict=True)]
        new_args, new_kwargs = sig.replace(args, kwargs, given)
        return first(func(*new_args, **new_kwargs))

    power = _power(func, args)
    edged = (func is ABSOLUTE and not tensors[0].is_complex()) or power <= 1 or math.isinf(power)
    of_one = value.numel() == tensors[0].numel() or (func in _ROWS and tensors[0].shape[-1] == 1)
    return Root(func, user_place(), power == 2 or of_one, edged, apply, value == 0, seed)


def first(outputs: Any) -> Tensor:
    """The root among the outputs of an operator."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def key_of(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Which root it is, and what it is taken of: equal for one and the same."""
    place = lambda t: (t.untyped_storage()._cdata, t._version, t.shape, t.stride(), t.storage_offset())
    plain = lambda a: place(a) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a
    return ("norm" if func in _NORMS else func, *map(plain, args), *map(plain, kwargs.values()))


def _power(func: OpOverload, args: Any) -> float:
    """The p of a p-norm."""
    if func in _NORMS:
        at = 1
    elif func in _PAIRS:
        at = 1 if func is aten._pdist_forward.default else 2
    else:
        return 2.0
    return 2.0 if len(args) <= at or args[at] is None else float(args[at])


def wide(func: OpOverload, args: Any, kwargs: Any, value: Tensor) -> Tensor | None:
    """A norm, or an absolute value, in the shape that it has with keepdim; None for another root."""
    if func not in _NORMS:
        return value if func is ABSOLUTE else None
    given = {argument.name: a for argument, a in zip(func._schema.arguments, args, strict=False)} | kwargs
    dim = given.get("dim")
    return expanded(value, tuple(dim) if dim else tuple(range(args[0].dim())), given.get("keepdim", False))


def differentiates(node: str, operator: OpOverload) -> bool:
    """Whether a node of autograd's graph belongs to an operator, by its name: StdMeanBackward0, std_mean."""
    return node.partition("Backward")[0] == operator.overloadpacket.__name__.title().replace("_", "")
