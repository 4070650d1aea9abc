"""Roots of sums of squares where they vanish: norms, distances, deviations, absolute values.

n = |e| has no derivative at e = 0. phi(n) has all of them if phi is even, as n², exp(-n²) and log cosh n are. PyTorch's
gradient phi'(n) e/n is guarded there: it is set to 0, and the derivative of what is set is 0. What it stands for is

    phi'(n) e/n  ->  phi''(0) e,      phi''(0) = lim phi'(n)/n,      by l'Hôpital's rule.

phi'(n) is what arrives at the root in the backward pass, so phi''(0) is the derivative of that by n. It is found by
following n: from the first root that vanishes, an arithmetic below the one that differentiates carries an imaginary
part that is 1 in each n = 0. A second one, with another number in each, tells whether what arrives at a root depends on
that root alone; if not, as in |x||y|, or if what arrives is not 0, as for n itself, there is no second derivative.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from imstep.complexstep.errors import NotDifferentiableWarning, user_place
from imstep.complexstep.registry import signature
from imstep.complexstep.report import Ledger
from imstep.complexstep.rules.piecewise import expanded
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane, Window

aten = torch.ops.aten

_NORMS = (aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
_PAIRS = (aten._cdist_forward.default, aten._pdist_forward.default, aten.dist.default)
_DEVIATIONS = (aten.std.correction, aten.std_mean.correction)
_EUCLIDEAN = aten._euclidean_dist.default
ROOTS = {id(op) for op in (*_NORMS, *_PAIRS, *_DEVIATIONS, _EUCLIDEAN, aten.abs.default)}
"""Operators that take a root, by identity."""

_QUOTIENTS = {aten.div.Tensor}
_GUARDS = {aten.masked_fill_.Scalar, aten.masked_fill.Scalar}
_GOLDEN = (math.sqrt(5) - 1) / 2
_numbers = itertools.count()


@dataclass(eq=False)
class _Root:
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
        arrived: the sum of what has arrived in the backward pass where it vanishes, each entry with a weight of its own,
            and that of magnitudes.
        lost: whether it leaves the result without a derivative.
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


class Roots:
    """The roots that vanish in one evaluation, and the gradients that pass through them.

    Args:
        arithmetic: the one that differentiates, as a mode.
        plane: its imaginary parts; None while a tape is recorded.
        followers: two more arithmetics, with their imaginary parts, to follow what the roots have a part in.
        ledger: where a missing derivative is entered.
        h: the step of finite arithmetic, or None.
    """

    def __init__(
        self,
        arithmetic: AbstractContextManager[Any],
        plane: Plane | None,
        followers: Sequence[tuple[AbstractContextManager[Any], Plane]],
        ledger: Ledger,
        h: float | None,
    ) -> None:
        self._arithmetic, self._plane, self._ledger = arithmetic, plane, ledger
        self._followers, self._planes = [f for f, _ in followers], [p for _, p in followers]
        self._least = 0.0 if h is None else 1e3 * h * h  # what h² leaves of a zero
        number = next(_numbers)
        self._root, self._of, self._ratio = (f"_imstep_{name}_{number}" for name in ("root", "root_of", "ratio"))
        self._roots: dict[Any, _Root] = {}
        self._warned: set[OpOverload] = set()
        self._seeds = 0
        self._inside = False

    # --- going forward ------------------------------------------------------------------------------------------

    def note(
        self, func: OpOverload, args: Any, kwargs: Any, value: Tensor, parts: Sequence[Any], on_tape: bool
    ) -> None:
        """``func`` has taken a root of what has the imaginary parts ``parts``, which on a tape are references."""
        vanishes = value == 0
        sig = signature(func)
        tensors = sig.gather(args, kwargs)

        def apply(parts: Sequence[Any]) -> Tensor:
            given = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, parts, strict=True)]
            new_args, new_kwargs = sig.replace(args, kwargs, given)
            return first(func(*new_args, **new_kwargs))

        key = _key(args, kwargs)
        root = self._roots.get(key)
        if root is None:
            power = _power(func, args)
            edged = (func is aten.abs.default and not tensors[0].is_complex()) or power <= 1 or math.isinf(power)
            alone = power == 2 or value.numel() == tensors[0].numel()
            root = _Root(func, user_place(), alone, edged, apply, vanishes, self._seeds)
            self._seeds += value.numel()
            self._roots[key] = root
            if on_tape:
                root.references = list(parts)
            else:
                root.look(parts)
        value.untyped_storage().__dict__[self._root] = root
        if func is aten.abs.default or (root.edged and func in _NORMS):
            wide = value if func is aten.abs.default else _wide(func, args, kwargs, value)
            tensors[0].untyped_storage().__dict__[self._of] = Window(tensors[0]), tensors[0], wide, root
        if root.round and not root.edged:
            self._bend(root, value, tensors, parts)
        self._mark(root, value)

    def _bend(self, root: _Root, value: Tensor, tensors: Sequence[Any], parts: Sequence[Any]) -> None:
        """Let the product of a root's first derivatives by two arithmetics, one in another, be what it is for n² / 2.

        D²phi(n)[v, w] = phi''(0) v·w at n = 0. The derivative along v is set to 1 and that along w to v·w, which is that
        of (|e + v|² - |e - v|²) / 4. The first derivatives themselves do not count where phi is even.
        """
        around = [mode for mode in _get_current_dispatch_mode_stack() if mode not in self._followers]
        if self._plane is None or not any(type(mode) is type(self._arithmetic) for mode in around):
            return
        pairs = [(t, 0 if d is None else d) for t, d in zip(tensors, parts, strict=True)]
        ahead, behind = root.apply([t + d for t, d in pairs]), root.apply([t - d for t, d in pairs])
        moved = root.vanishes & (ahead != 0)
        value.add_(torch.where(moved, (ahead.square() - behind.square()) / 4, 0))
        with _disable_current_modes():
            value.masked_fill_(moved, 0)  # but for rounding it is zero
        known = self._plane.get(value)
        self._plane.write(value, torch.where(moved, 1.0, 0.0 if known is None else known))

    def _mark(self, root: _Root, value: Tensor) -> None:
        count = torch.arange(root.seed + 1, root.seed + 1 + value.numel(), device=value.device)
        distinct = 1 + torch.frac(count.to(torch.float64) * _GOLDEN).reshape(value.shape).to(value.dtype)
        for plane, seed in zip(self._planes, (torch.ones_like(value), distinct), strict=True):
            known = plane.get(value)
            plane.write(value, torch.where(root.vanishes, seed, 0 if known is None else known))

    # --- one operator after the other ---------------------------------------------------------------------------

    def concern(self, func: OpOverload, tensors: Sequence[Any]) -> bool:
        """Whether a root has a part in the arguments of ``func``."""
        if func is aten.sgn.default:
            return self._of in tensors[0].untyped_storage().__dict__
        if self._planes[0].attached(tensors) is not None:
            return True
        return func is aten.mul.Tensor and any(self._ratio_of(t) is not None for t in tensors)

    def follow(self, func: OpOverload, args: Any, run: Callable[[], Any]) -> Any:
        """Carry out ``func`` by ``run``, followed; where it divides by a root that vanishes, by its limit."""
        if self._inside:
            outputs = run()
        else:
            with ExitStack() as stack:
                for follower in reversed(self._followers):
                    stack.enter_context(follower)
                self._inside = True
                try:
                    outputs = run()
                finally:
                    self._inside = False
        if func in _QUOTIENTS:
            self._divided(*args[:2], outputs)
        elif func in _GUARDS:
            return self._guarded(args[0], outputs)
        elif func is aten.sgn.default:
            window, x, wide, root = args[0].untyped_storage().__dict__[self._of]
            if window.fits(args[0]):
                self._remember(outputs, x, wide, root, False)
        elif func is aten.clone.default:  # such as one in another layout, for the backward pass
            root = args[0].untyped_storage().__dict__.get(self._root)
            if root is not None:
                outputs.untyped_storage().__dict__[self._root] = root
        elif func is aten.mul.Tensor:
            return self._multiplied(args[0], args[1], outputs)
        return outputs

    def _remember(self, quotient: Tensor, *parts: Any) -> None:
        quotient.untyped_storage().__dict__[self._ratio] = Window(quotient), *parts

    def _ratio_of(self, t: Any) -> Any:
        """What ``t`` is a quotient of, and by which root; None if it is none."""
        if not isinstance(t, Tensor):
            return None
        window, *parts = t.untyped_storage().__dict__.get(self._ratio, (None,))
        return parts if window is not None and window.fits(t) else None

    def _divided(self, numerator: Any, denominator: Any, quotient: Tensor) -> None:
        if not isinstance(denominator, Tensor) or self._planes[0].find(denominator) is None:
            return
        root = denominator.untyped_storage().__dict__.get(self._root)
        of_gradient = root is None or root.operator is _EUCLIDEAN
        if root is None:  # a multiple or a power of one, in the backward pass of the operator
            node = torch._C._current_autograd_node()
            name = "" if node is None else node.name()
            root = next((r for r in reversed(self._roots.values()) if _differentiates(name, r.operator)), None)
        if root is not None:
            self._remember(quotient, numerator, denominator, root, of_gradient)

    def _guarded(self, quotient: Tensor, outputs: Tensor) -> Tensor:
        ratio = self._ratio_of(quotient)
        if ratio is None:
            return outputs
        numerator, denominator, root, of_gradient = ratio
        if not of_gradient:
            self._remember(outputs, *ratio)  # till it is multiplied by the gradient
            return outputs
        limit = self._limit(numerator, denominator, root)
        if limit is not None:
            with self._arithmetic:
                outputs.copy_(torch.where(limit == 0, outputs, limit))
        return outputs

    def _multiplied(self, a: Any, b: Any, product: Tensor) -> Tensor:
        """Where a factor is e/n, guarded, and the other one a gradient g: e lim g/n is what is missing."""
        for gradient, unit in ((a, b), (b, a)):
            ratio = self._ratio_of(unit)
            if ratio is None or ratio[3] or not isinstance(gradient, Tensor) or gradient.dtype is torch.bool:
                continue
            limit = self._limit(gradient, *ratio[1:3])
            if limit is not None:
                with self._arithmetic:
                    return product + ratio[0] * limit
        return product

    def _limit(self, gradient: Tensor, denominator: Tensor, root: _Root) -> Tensor | None:
        """The derivative of the gradient by the denominator where that vanishes, else 0; None if it is 0 everywhere."""
        zero = denominator == 0
        parts = [(plane.get(gradient), plane.get(denominator)) for plane in self._planes]
        distinct = 1.0 if parts[1][1] is None else parts[1][1]
        root.receive(torch.where(zero & (gradient.abs() > self._least), gradient, 0), distinct)
        if any(by_root is None or slope is None for by_root, slope in parts):
            return None
        limits, odd = [], torch.zeros_like(zero)
        for by_root, slope in parts:
            proper = zero & (slope != 0) & slope.isfinite()
            limits.append(torch.where(proper, by_root / torch.where(proper, slope, 1), 0))
            odd = odd | (zero & ~proper & (by_root != 0))
        one, other = limits
        eps = torch.finfo(one.dtype).eps
        depends = (one - other).abs() > math.sqrt(eps) * (one.abs() + other.abs()) + 10 * eps
        odd = odd | depends if root.round else odd | (one != 0)
        if bool(odd.any()):
            self._lose(root)
        limit = torch.where(odd, 0, one)
        self._carry(limit, gradient, parts[0][1])
        return limit

    def _carry(self, limit: Tensor, gradient: Tensor, slope: Tensor) -> None:
        """Let the limit change with the direction, for a derivative further out."""
        part = None if self._plane is None else self._plane.get(gradient)
        by_root = None if part is None else self._planes[0].get(part)
        if by_root is not None and self._plane is not None:
            change = torch.where(limit != 0, by_root / torch.where(limit != 0, slope, 1), 0)
            self._plane.put(limit, change)

    # --- where there is no derivative ---------------------------------------------------------------------------

    def settle(self, results: Sequence[Tensor | None]) -> None:
        """The evaluation has come to results: where they change with a root in first order, it leaves an edge."""
        if any(self._has_edge(t) for t in results if t is not None):
            for root in self._roots.values():
                if not root.edged:
                    self._lose(root)

    def conclude(self, tape: Tape | None) -> None:
        """Nothing more arrives: warn of what has no derivative in the direction or, on a tape, in a random one."""
        lost = [root for root in self._roots.values() if root.lost or root.has_edge()]
        pending = [root for root in lost if root.moves is None]
        if tape is not None and pending:
            self._probe(pending, tape)
        for root in lost:
            self._lose(root)

    def _has_edge(self, t: Tensor) -> bool:
        """Whether a result changes with a root in first order."""
        by_root = self._planes[0].get(t)
        if by_root is None or t.numel() == 0:
            return False
        rounding = 10 * torch.finfo(t.dtype).eps * t.abs().max()
        return bool((by_root.abs() > rounding).any())

    def _lose(self, root: _Root) -> None:
        root.lost = True
        if root.moves:
            self._warn(root)

    def _probe(self, roots: list[_Root], tape: Tape) -> None:
        """Along a random direction, which of the roots move."""
        with _disable_current_modes(), torch.no_grad():
            watched = [root.references for root in roots]
            flat = [reference for references in watched for reference in references if reference is not None]
            parts = iter(tape.watching(flat).replay(tape.probe(roots[0].vanishes.device))[-len(flat) :])
            for root, references in zip(roots, watched, strict=True):
                root.look([None if reference is None else next(parts) for reference in references])

    def _warn(self, root: _Root) -> None:
        if root.operator in self._warned:
            return
        self._warned.add(root.operator)
        self._ledger.mark(root.operator)
        text = (
            f"{root.operator} is zero, where it has no derivative, and what is made of it does not smooth that: the "
            "derivative there is taken to be 0, as in PyTorch's gradient. If it is to count, add a small number under "
            "the root, as in (x.square().sum() + 1e-12).sqrt(), or use the squares themselves."
        )
        place = root.place
        if place is None:
            warnings.warn(text, NotDifferentiableWarning, stacklevel=2)
        else:
            file, line, registry = place
            warnings.warn_explicit(text, NotDifferentiableWarning, file, line, registry=registry)


def first(outputs: Any) -> Tensor:
    """The root among the outputs of an operator."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _key(args: Any, kwargs: Any) -> Any:
    """What a root is taken of: equal for one and the same."""
    named = [*args, *kwargs.values()]
    place = lambda t: (t.untyped_storage()._cdata, t._version, t.shape, t.stride(), t.storage_offset())
    return tuple(place(a) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a for a in named)


def _power(func: OpOverload, args: Any) -> float:
    """The p of a p-norm."""
    if func in _NORMS:
        at = 1
    elif func in _PAIRS:
        at = 1 if func is aten._pdist_forward.default else 2
    else:
        return 2.0
    return 2.0 if len(args) <= at or args[at] is None else float(args[at])


def _wide(func: OpOverload, args: Any, kwargs: Any, value: Tensor) -> Tensor:
    """A norm in the shape that it has with keepdim."""
    given = {argument.name: a for argument, a in zip(func._schema.arguments, args, strict=False)} | kwargs
    dim = given.get("dim")
    return expanded(value, tuple(dim) if dim else tuple(range(args[0].dim())), given.get("keepdim", False))


def _differentiates(node: str, operator: OpOverload) -> bool:
    """Whether a node of autograd's graph belongs to an operator, by its name: StdMeanBackward0, std_mean."""
    return node.partition("Backward")[0] == operator.overloadpacket.__name__.title().replace("_", "")
