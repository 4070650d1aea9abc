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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from imstep.complexstep.errors import ComplexStepError
from imstep.complexstep.missing import Missing, depends
from imstep.complexstep.registry import signature
from imstep.complexstep.report import Ledger
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane, Window
from imstep.complexstep.vanishing import ABSOLUTE, EUCLIDEAN, Root, differentiates, key_of, root_of, wide

aten = torch.ops.aten

_GUARDS = {aten.masked_fill_.Scalar, aten.masked_fill.Scalar}
_OF_ROWS = {aten._cdist_backward.default, aten._pdist_backward.default}
_GOLDEN = (math.sqrt(5) - 1) / 2
_numbers = itertools.count()


class Roots:
    """The roots that vanish in one evaluation, and the gradients that pass through them.

    Args:
        arithmetic: the one that differentiates, as a mode.
        plane: its imaginary parts; None while a tape is recorded.
        followers: two more arithmetics, with their imaginary parts, to follow what the roots have a part in.
        ledger: where a missing derivative is entered.
        h: the step of finite arithmetic, or None.

    Attributes:
        branch: what stands for a magnitude that vanishes, within another arithmetic: that times the number, 1 or -1.
        branched: whether there was one.
    """

    def __init__(
        self,
        arithmetic: AbstractContextManager[Any],
        plane: Plane | None,
        followers: Sequence[tuple[AbstractContextManager[Any], Plane]],
        ledger: Ledger,
        h: float | None,
    ) -> None:
        self._arithmetic, self._plane = arithmetic, plane
        self._followers, self._planes = [f for f, _ in followers], [p for _, p in followers]
        self._least = 0.0 if h is None else 1e3 * h * h  # what h² leaves of a zero
        number = next(_numbers)
        self._root, self._ratio = f"_imstep_root_{number}", f"_imstep_ratio_{number}"
        self._roots: dict[Any, Root] = {}
        self._signed: dict[int, tuple[Window, Tensor, Any, Root]] = {}  # by memory; what is kept keeps its place
        self._missing = Missing(ledger, _REASON)
        self._seeds = 0
        self._inside = False
        self.branch, self.branched = 1, False

    # --- going forward ------------------------------------------------------------------------------------------

    def note(
        self, func: OpOverload, args: Any, kwargs: Any, value: Tensor, parts: Sequence[Any], on_tape: bool
    ) -> None:
        """``func`` has taken a root of what has the imaginary parts ``parts``, which on a tape are references."""
        tensors, key = signature(func).gather(args, kwargs), key_of(func, args, kwargs)
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = root_of(func, args, kwargs, value, self._seeds)
            self._seeds += value.numel()
            if on_tape:
                root.references = list(parts)
            else:
                root.look(parts)
        value.untyped_storage().__dict__[self._root] = root
        norm = wide(func, args, kwargs, value)
        if (root.edged and norm is not None) or func is ABSOLUTE:  # of which the gradient is a multiple of the sign
            self._signed[_memory(tensors[0])] = Window(tensors[0]), tensors[0], norm, root
        modes = _get_current_dispatch_mode_stack()
        around: list[Any] = [mode for mode in modes if type(mode) is type(self._arithmetic)]
        if root.round and root.edged and around and self._plane is not None:
            self._take_branch(root, value, tensors[0], parts[0])
            return
        if root.round and not root.edged and around:
            if len(around) > 1 and sum(mode.moves(root, tensors) for mode in around) > 1:
                raise ComplexStepError(f"{func} {_TOO_DEEP}")
            self._bend(root, value, tensors, parts)
        self._mark(root, value)

    def _take_branch(self, root: Root, value: Tensor, x: Tensor, part: Tensor | None) -> None:
        """Let a magnitude that vanishes be the number itself, or its negative; the mean over both is what is even."""
        assert self._plane is not None
        self.branched, root.branched = True, True
        value.copy_(torch.where(root.vanishes, self.branch * x.reshape(value.shape), value))
        known = self._plane.get(value)
        moved = 0.0 if part is None else self.branch * part.reshape(value.shape)
        self._plane.write(value, torch.where(root.vanishes, moved, 0.0 if known is None else known))

    def _bend(self, root: Root, value: Tensor, tensors: Sequence[Any], parts: Sequence[Any]) -> None:
        """Let the product of a root's derivatives by two arithmetics, one within the other, be that of e, v·w.

        D²phi(n)[v, w] = phi''(0) v·w at n = 0. The derivative along v is set to 1, that along w to v·w, that of
        (|e + v|² - |e - v|²) / 4. By themselves first derivatives of a root do not count where phi is even.
        """
        if self._plane is None:
            return
        pairs = [(t, 0 if d is None else d) for t, d in zip(tensors, parts, strict=True)]
        ahead, behind = root.apply([t + d for t, d in pairs]), root.apply([t - d for t, d in pairs])
        moved = root.vanishes & (ahead != 0)
        value.add_(torch.where(moved, (ahead.square() - behind.square()) / 4, 0))
        with _disable_current_modes():
            value.masked_fill_(moved, 0)  # but for rounding it is zero
        known = self._plane.get(value)
        self._plane.write(value, torch.where(moved, 1.0, 0.0 if known is None else known))

    def _mark(self, root: Root, value: Tensor) -> None:
        count = torch.arange(root.seed + 1, root.seed + 1 + value.numel(), device=value.device)
        distinct = 1 + torch.frac(count.to(torch.float64) * _GOLDEN).reshape(value.shape).to(value.dtype)
        for plane, seed in zip(self._planes, (torch.ones_like(value), distinct), strict=True):
            known = plane.get(value)
            plane.write(value, torch.where(root.vanishes, seed, 0 if known is None else known))

    # --- one operator after the other ---------------------------------------------------------------------------

    def concern(self, func: OpOverload, tensors: Sequence[Any]) -> bool:
        """Whether a root has a part in the arguments of ``func``."""
        if func is aten.sgn.default:
            return _memory(tensors[0]) in self._signed
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
        if func is aten.div.Tensor:
            self._divided(args[0], args[1], outputs)
        elif func in _GUARDS:
            return self._guarded(args[0], outputs)
        elif func is aten.sgn.default:
            window, x, norm, root = self._signed[_memory(args[0])]
            if root.branched and window.fits(args[0]) and torch._C._current_autograd_node() is not None:
                with _disable_current_modes():
                    outputs.masked_fill_(root.vanishes.reshape(outputs.shape), self.branch)
            elif window.fits(args[0]):
                self._remember(outputs, x, norm, root, False)
        elif func is aten.clone.default:  # such as one in another layout, for the backward pass
            root = args[0].untyped_storage().__dict__.get(self._root)
            if root is not None:
                outputs.untyped_storage().__dict__[self._root] = root
        elif func is aten.mul.Tensor:
            return self._multiplied(args[0], args[1], outputs)
        elif func in _OF_ROWS:
            self._arrived(args[0], args[-1])
        return outputs

    def _arrived(self, gradient: Tensor, distances: Tensor) -> None:
        """What arrives at distances by another norm than Euclid's, which nothing smooths."""
        root = distances.untyped_storage().__dict__.get(self._root)
        if root is not None and not root.round:
            self._limit(gradient, distances, root)

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
        of_gradient = root is None or root.operator is EUCLIDEAN
        if root is None:  # a multiple or a power of one, in the backward pass of the operator
            node = torch._C._current_autograd_node()
            name = "" if node is None else node.name()
            root = next((r for r in reversed(self._roots.values()) if differentiates(name, r.operator)), None)
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

    def _limit(self, gradient: Tensor, denominator: Tensor, root: Root) -> Tensor | None:
        """The derivative of the gradient by the denominator where that vanishes, else 0; None if it is 0 everywhere."""
        zero = denominator == 0
        slopes = [plane.get(denominator) for plane in self._planes]
        parts = [plane.get(gradient) for plane in self._planes]
        weights = torch.ones_like(denominator) if slopes[1] is None else slopes[1]
        root.receive(torch.where(zero & (gradient.abs() > self._least), gradient, 0), weights)
        limits, odd = [], torch.zeros_like(zero)
        for by_root, slope in zip(parts, slopes, strict=True):
            if by_root is None or slope is None:
                return None
            proper = zero & (slope != 0) & slope.isfinite()
            limits.append(torch.where(proper, by_root / torch.where(proper, slope, 1), 0))
            odd = odd | (zero & ~proper & (by_root != 0))
        one, other = limits
        eps = torch.finfo(one.dtype).eps
        depends = (one - other).abs() > math.sqrt(eps) * (one.abs() + other.abs()) + 10 * eps
        odd = odd | depends | ~one.isfinite() | ~other.isfinite() if root.round else odd | (one != 0)
        if bool(odd.any()):
            self._missing.lose(root)
        limit = torch.where(odd, 0, one)
        self._carry(limit, gradient, slopes[0])
        return limit

    def _carry(self, limit: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        """Let the limit change with the direction, for a derivative further out."""
        part = None if self._plane is None else self._plane.get(gradient)
        by_root = None if part is None else self._planes[0].get(part)
        if by_root is not None and slope is not None and self._plane is not None:
            change = torch.where(limit != 0, by_root / torch.where(limit != 0, slope, 1), 0)
            self._plane.put(limit, change)

    # --- where there is no derivative ---------------------------------------------------------------------------

    def settle(self, results: Sequence[Tensor | None]) -> None:
        """The evaluation has come to results: where they change with a root in first order, it leaves an edge."""
        if any(t is not None and depends(t, self._planes[0].get(t)) for t in results):
            for root in self._roots.values():
                if not root.edged:
                    self._missing.lose(root)

    def conclude(self, tape: Tape | None) -> None:
        """Nothing more arrives: warn of what has no derivative in the direction or, on a tape, in a random one."""
        self._missing.conclude([root for root in self._roots.values() if root.lost or root.has_edge()], tape)


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


_TOO_DEEP = (
    "is zero, and what may smooth that is beyond three derivatives nested in each other. Take third derivatives by "
    "imstep.third_derivative, or use squares in place of the root."
)
_REASON = (
    "is zero, where it has no derivative, and what is made of it does not smooth that: the derivative there is taken "
    "to be 0, as in PyTorch's gradient. If it is to count, add a small number under the root, as in "
    "(x.square().sum() + 1e-12).sqrt(), or use the squares themselves."
)
