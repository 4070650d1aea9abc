"""The arithmetic: every operator that runs while it is active is carried out on complex-step numbers.

It sits below autograd (``TorchDispatchMode``), so autograd records real formulas, and the backward pass it derives
from them runs on complex-step numbers as well: the gradient that comes out is the analytic continuation of
the gradient, and its imaginary part is the Hessian-vector product. ``create_graph`` and ``torch.func`` transforms *inside*
the loss arrive here as ordinary operators.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from imstep.complexstep import rules
from imstep.complexstep.errors import REPORT, UnsupportedOperatorError
from imstep.complexstep.islands import Islands
from imstep.complexstep.registry import Rule, Signature, lookup, signature
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import ComplexStepTensor, Plane, is_constant_copy, mark_constant

rules.load()


class Arithmetic:
    """One evaluation on complex-step numbers; use as a context around the code to differentiate.

    Args:
        h: None for infinitesimal arithmetic (h² terms dropped), or the step of finite arithmetic, h > 0.
        tape: where to record the linear maps of this evaluation (infinitesimal arithmetic only).

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> with Arithmetic() as arithmetic:
        ...     z = arithmetic.number(x, torch.tensor([1.0, 0.0], dtype=torch.float64))
        ...     y = (z ** 3).sum()
        >>> arithmetic.value(y).im
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, h: float | None = None, tape: Tape | None = None) -> None:
        if h is not None and not h > 0:
            raise ValueError(f"h must be positive, got {h}. Use h=None for infinitesimal arithmetic.")
        if h is not None and tape is not None:
            raise ValueError("a tape records linear maps; finite arithmetic (h given) has none. Use h=None.")
        self.plane = Plane()
        self.h = h
        self.tape = tape
        self.counts: Counter[tuple[str, str]] = Counter()
        self.islands = Islands()
        self._dispatch = _Dispatch(self)
        self._stack = ExitStack()

    def __enter__(self) -> Arithmetic:
        torch.clear_autocast_cache()  # casts made before would lack the imaginary part
        with ExitStack() as stack:
            stack.enter_context(self._dispatch)
            stack.enter_context(self.islands)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        torch.clear_autocast_cache()

    def attach(self, t: Tensor, im: Tensor) -> None:
        """Give ``t`` the imaginary part ``im`` (copied; same shape, dtype of ``t``) in this arithmetic."""
        slot = -1 if self.tape is None else self.tape.input(im)
        with torch.no_grad():
            self.plane.drop(t)
            self.plane.put(t, im.to(t.dtype).clone(), slot)

    def number(self, re: Tensor, im: Tensor) -> Tensor:
        """A copy of ``re`` with the imaginary part ``im``; a leaf that does not require gradients."""
        t = re.detach().clone()
        self.attach(t, im)
        return t

    def value(self, t: Tensor) -> ComplexStepTensor:
        """What ``t`` holds: the tensor itself and a view of its imaginary part."""
        return ComplexStepTensor(t, self.plane.get(t))

    def gradient(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        """The gradient of ``loss``, whose imaginary part is the derivative of the gradient; None where independent."""
        if not loss.requires_grad:
            return [None] * len(inputs)
        self.islands.outermost = True
        try:
            return list(torch.autograd.grad(loss, inputs, allow_unused=True))
        finally:
            self.islands.outermost = False

    def release(self, t: Tensor) -> None:
        """Forget the imaginary part of ``t``."""
        self.plane.drop(t)


class _Dispatch(TorchDispatchMode):
    """Carries out single operators for an :class:`Arithmetic`."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.owner = arithmetic
        self.plane = arithmetic.plane

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sig = signature(func)
        tensors = sig.gather(args, kwargs)
        if sig.mutates:
            return self._mutate(func, sig, tensors, args, kwargs)
        if not self._live(tensors):
            return func(*args, **kwargs)
        if self.owner.islands.active:
            return self._constant(func, sig, args, kwargs)
        if sig.view:
            return func(*args, **kwargs)
        return self._apply(func, sig, tensors, args, kwargs)

    def _live(self, tensors: list[Any]) -> bool:
        find = self.plane.find
        for t in tensors:
            if isinstance(t, (list, tuple)):
                if any(u is not None and find(u) is not None for u in t):
                    return True
            elif t is not None and find(t) is not None:
                return True
        return False

    def _count(self, func: OpOverload, how: str) -> None:
        self.owner.counts[str(func), how] += 1

    def _constant(self, func: OpOverload, sig: Signature, args: Any, kwargs: Any) -> Any:
        """Inside an island: the real result, in memory of its own where it would be a view of a live tensor."""
        self._count(func, "cut")
        outputs = func(*args, **kwargs)
        copy = lambda t: mark_constant(t.clone()) if self.plane.find(t) is not None else t
        if isinstance(outputs, Tensor):
            return copy(outputs)
        return type(outputs)(copy(t) if isinstance(t, Tensor) else t for t in outputs) if sig.view else outputs

    def _apply(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        rule = lookup(func)
        if rule is None:
            return self._decompose(func, args, kwargs)
        h = self.owner.h
        if h is not None and rule.finite is None:
            return self._decompose(func, args, kwargs)
        self._count(func, rule.family)
        ims = [self._imaginary(t) for t in tensors]
        if h is not None:
            assert rule.finite is not None
            outputs, d_outputs = rule.finite(func, args, kwargs, ims, h)
            self._store(outputs, d_outputs)
            return outputs
        return self._push(rule, func, tensors, args, kwargs, ims)

    def _push(self, rule: Rule, func: OpOverload, tensors: list[Any], args: Any, kwargs: Any, ims: list[Any]) -> Any:
        outputs, push = rule.linearize(func, args, kwargs)
        if push is None:
            return outputs
        d_outputs = push(*ims)
        tape = self.owner.tape
        if tape is None:
            self._store(outputs, d_outputs)
        else:
            inputs = [self._references(t) for t in tensors]
            slots = self._store(outputs, d_outputs, tape)
            tape.record(push, inputs, slots)
        return outputs

    def _imaginary(self, t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return [None if u is None else self.plane.get(u) for u in t]
        return None if t is None else self.plane.get(t)

    def _references(self, t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return [self._references(u) for u in t]
        found = None if t is None else self.plane.find(t)
        return None if found is None else (found.slot, Tape.window(t, found.base))

    def _store(self, outputs: Any, d_outputs: Any, tape: Tape | None = None) -> Any:
        """Attach imaginary parts to fresh outputs; returns the slots they got on the tape."""
        if isinstance(outputs, Tensor):
            if d_outputs is None or self.plane.find(outputs) is not None:
                return None
            slot = -1 if tape is None else tape.define(outputs)
            self.plane.put(outputs, d_outputs, slot)
            return slot
        if d_outputs is None or not isinstance(outputs, (list, tuple)):
            return None
        return [self._store(o, d, tape) for o, d in zip(outputs, d_outputs, strict=True)]

    def _decompose(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Carry out an operator without a rule through the simpler operators it is defined by."""
        decomposition = rules.decomposition(func)
        if decomposition is None:
            finite = self.owner.h is not None and lookup(func) is not None
            raise UnsupportedOperatorError(
                func,
                "it has no formula for a finite step h." if finite else "it has no complex-step rule and no decomposition.",
                "Use h=None (infinitesimal arithmetic)." if finite else REPORT,
            )
        self._count(func, "decomposition")
        with self:
            return decomposition(*args, **kwargs)

    # --- in-place operators -------------------------------------------------------------------------------------

    def _mutate(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        targets = [t for t, (*_, written) in zip(tensors, sig.tensors, strict=True) if written]
        for t in targets:
            if isinstance(t, Tensor) and is_constant_copy(t):
                raise UnsupportedOperatorError(
                    func,
                    "it writes into a view made by .detach(), .data or under no_grad of a tensor that is being differentiated.",
                    "Write to the tensor itself, or clone() the detached view first.",
                )
        if not self._live(tensors):
            return func(*args, **kwargs)
        if self.owner.islands.active:
            return func(*args, **kwargs)  # autograd does not see this write either: values change, derivatives stay
        if func is torch.ops.aten.copy_.default:
            return self._copy(func, args, kwargs)
        if sig.functional is None or len(targets) != 1 or not isinstance(targets[0], Tensor):
            raise UnsupportedOperatorError(func, "it overwrites memory and has no functional form.", REPORT)
        kwargs = {k: v for k, v in kwargs.items() if not (k == "out" or v is targets[0])}
        with self:
            result = sig.functional(*args, **kwargs)
            if targets[0].shape != result.shape:
                targets[0].resize_(result.shape)
            targets[0].copy_(result)
        return targets[0]

    def _copy(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        target, source = args[0], args[1]
        im = self.plane.get(source)
        if im is not None and not (target.is_floating_point() or target.is_complex()):
            im = None
        inputs = self._references(source)
        outputs = func(*args, **kwargs)
        known = self.plane.find(target)
        tape = self.owner.tape
        if known is None and im is None:
            return outputs
        if known is None:
            slot = -1 if tape is None else tape.define_zero(target)
            mirrored = self.plane.put(target, torch.zeros((), dtype=target.dtype, device=target.device).expand(target.shape), slot)
        else:
            mirrored = known
        self.plane.write(target, im)
        if tape is not None:
            tape.record_write(inputs, (mirrored.slot, Tape.window(target, mirrored.base)))
        return outputs
