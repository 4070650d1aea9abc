"""One operator at a time: find the imaginary parts of its arguments, apply its rule, attach those of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from imstep.complexstep import rules
from imstep.complexstep.errors import COLLECTIVE, DENSE, MOVED, NESTED, OWN, REPORT, UnsupportedOperatorError
from imstep.complexstep.gradients import nodes
from imstep.complexstep.islands import Islands, plain, unseen
from imstep.complexstep.jumps import JUMPS, Jumps, at_zero
from imstep.complexstep.recorder import Recorder
from imstep.complexstep.registry import FRESH, Rule, Signature, any_complex, conjugating, exact, lookup, signature
from imstep.complexstep.report import Ledger
from imstep.complexstep.roots import Roots
from imstep.complexstep.rules.forms import WORKING
from imstep.complexstep.steps import EXCHANGES
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane
from imstep.complexstep.vanishing import ROOTS, Root, first

rules.load()

_RESHAPED_IN_PLACE = {
    getattr(torch.ops.aten, name)
    for name in ("transpose_", "t_", "squeeze_", "unsqueeze_", "swapdims_", "swapaxes_", "as_strided_", "set_")
}
_seen_by_mode = torch._C._is_torch_function_mode_enabled
_RESIZED = {torch.ops.aten.resize_, torch.ops.aten.resize_as_}
_REMEDIES = {"sparse": DENSE, "nested": NESTED}  # by what is in an operator's name
_EVALUATED = ("elementwise", "reduction")  # families whose finite arithmetic is a complex evaluation


class Dispatch(Recorder):
    """Carries out the operators of one :class:`~imstep.complexstep.arithmetic.Arithmetic`."""

    supports_higher_order_operators = True  # to refuse them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every operator the wrapper that keeps PyTorch's compiler out of a mode (a quarter of the cost)."""
        return False

    def __init__(
        self,
        plane: Plane,
        islands: Islands,
        ledger: Ledger,
        h: float | None,
        tape: Tape | None,
        before_write: Callable[[Tensor | Generator], None] | None,
        witness: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(plane, islands, ledger, tape)
        self._h, self._before_write, self._witness = h, before_write, witness
        self._decomposing: list[OpOverload] = []
        self.raised: Exception | None = None  # the last error, of which TorchScript shows nothing
        self.branch, self.branched = 1, False  # see Roots

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            if _seen_by_mode():  # no function was seen to call, as in a backward pass
                with unseen():
                    if self._islands.hides_cut(func):
                        with self._islands.island():
                            return self._dispatch(func, args, kwargs or {})
                    return self._dispatch(func, args, kwargs or {})
            return self._dispatch(func, args, kwargs or {})
        except Exception as error:
            self.raised = error
            raise

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = args
        if self._islands.subclasses:
            self._given = args  # with their graphs
            args, kwargs = tree_map_only(Tensor, plain, (args, kwargs))
        sig = signature(func)
        if sig.window and not self._islands.active and isinstance(args[0], Tensor) and not args[0].is_complex():
            outputs = func(*args, **kwargs)  # another window onto the same memory
            if func is FRESH and self._before_write is not None:
                self._mark_born(outputs)
            return outputs
        if self._tape is not None:
            foreseen = self._tape.foreseen
            if foreseen is not None and foreseen.step.func is func and self._is(foreseen, args, kwargs):
                outputs = self._as_foreseen(func, foreseen.step, args, kwargs)
                if self._before_write is not None:
                    self._mark_born(outputs)
                if self._witness is not None:
                    self._witness(func, sig, sig.gather(given, kwargs), given, kwargs, outputs)
                return outputs
        tensors = sig.gather(args, kwargs)
        if any_complex(tensors):
            outputs = conjugating(self._observe, (func, sig, tensors, args, kwargs), {})
        else:
            outputs = self._observe(func, sig, tensors, args, kwargs)
        if self._witness is not None:
            self._witness(func, sig, sig.gather(given, kwargs), given, kwargs, outputs)
        return outputs

    def _observe(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        if self._roots is None and self._jumps is None:
            return self._watched(func, sig, tensors, args, kwargs)
        if self._jumps is not None and self._jumps.concern(tensors) and not self._islands.final:
            return self._jumps.follow(lambda: self._followed(func, sig, tensors, args, kwargs))
        return self._followed(func, sig, tensors, args, kwargs)

    def _followed(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        if self._roots is not None and self._roots.concern(func, tensors):
            return self._roots.follow(func, args, lambda: self._watched(func, sig, tensors, args, kwargs))
        return self._watched(func, sig, tensors, args, kwargs)

    def _watched(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        if self._before_write is not None:
            for at in sig.overwritten:
                self._watch(tensors[at])
            if kwargs.get("generator") is not None:
                self._before_write(kwargs["generator"])
            outputs = self._carry_out(func, sig, tensors, args, kwargs)
            if not (sig.view or sig.mutates):
                self._mark_born(outputs)
            return outputs
        return self._carry_out(func, sig, tensors, args, kwargs)

    def _carry_out(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        if sig.mutates:
            outputs = self._mutate(func, sig, tensors, args, kwargs)
            sig.count_writes(tensors)
            self._renew(t for t, (*_, written) in zip(tensors, sig.tensors, strict=True) if written)
            return outputs
        attached = self._plane.attached(tensors)
        if attached is None:
            if id(func) not in EXCHANGES or self._islands.active:
                outputs = func(*args, **kwargs)
                if self._notes is not None and not sig.view:
                    self._notes.note(func, args, kwargs, outputs)
                return outputs
            attached = [None] * len(tensors)
        if self._islands.active:
            return self._constant(func, sig, args, kwargs)
        if sig.composite and lookup(func) is None:
            # Autograd would have taken it apart; what a rule or a decomposition calls arrives whole, and one that is a
            # view by its schema, such as reshape, may be a copy.
            with self:
                return func.decompose(*args, **kwargs)
        if sig.view:
            return func(*args, **kwargs)
        outputs = self._apply(func, tensors, attached, args, kwargs)
        if id(func) in ROOTS and not WORKING:  # one that the rule of another arithmetic takes is noted there
            self._note_root(func, tensors, attached, args, kwargs, outputs)
        elif id(func) in JUMPS and not WORKING:
            self._note_jump(func, tensors, attached, outputs)
        return outputs

    def _note_root(self, func: OpOverload, tensors: Any, attached: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        value = first(outputs)
        if not bool((value == 0).any()):
            return
        if self._roots is None:
            plane = None if self._tape is not None else self._plane
            self._roots = Roots(self, plane, [self._follower(), self._follower()], self._ledger, self._h)
            self._roots.branch = self.branch
        WORKING.append(self._born)
        try:
            self._roots.note(func, args, kwargs, value, self._parts(tensors, attached), self._tape is not None)
        finally:
            WORKING.pop()
        self.branched |= self._roots.branched

    def _note_jump(self, func: OpOverload, tensors: Any, attached: Any, value: Tensor) -> None:
        zero = at_zero(func, tensors)
        if zero is None or torch._C._current_autograd_node() is not None:  # that of a root is seen to by the root
            return
        if self._jumps is None:
            self._jumps = Jumps(*self._follower(), self._ledger)
        self._jumps.note(func, value, zero, self._parts(tensors, attached), self._tape is not None)

    def _follower(self) -> tuple[Follower, Plane]:
        """Another arithmetic on what is evaluated here, with its imaginary parts."""
        plane = Plane()
        return Follower(plane, self._islands, Ledger(), None, None, None), plane

    def _parts(self, tensors: Sequence[Any], attached: Sequence[Any]) -> list[Any]:
        """The imaginary parts of tensors; what they are on the tape if there is one."""
        return self._imaginary(tensors) if self._tape is None else self._references(tensors, attached)

    def settle(self, results: Sequence[Tensor | None]) -> None:
        """The evaluation has come to ``results``, or a backward pass begins at them: do they have a derivative?"""
        for watching in (self._roots, self._jumps):
            if watching is not None:
                watching.settle(results)

    def begin_last(self, outputs: Sequence[Any]) -> list[Any]:
        """The backward pass that is to be differentiated begins at ``outputs``; hooks to be removed after it."""
        tensors = [plain(t) for t in outputs if isinstance(t, Tensor)]
        if self._jumps is not None:
            self._jumps.settle(tensors)
        if self._tape is None or self._tape.cotangents is None:
            return []
        return self._tape.cotangents.watch(self._tape, nodes(tensors), self.reference)

    def conclude(self, failed: bool = False) -> None:
        """The evaluation is over: warn of what has left something without a derivative, and forget it."""
        super().conclude(failed)
        watching, self._roots, self._jumps = (self._roots, self._jumps), None, None
        for found in watching:
            if found is not None and not failed:
                found.conclude(self._tape)

    def carries(self, t: Tensor) -> bool:
        """Whether ``t`` has an imaginary part here."""
        return self._plane.find(t) is not None

    def moves(self, root: Root, tensors: Sequence[Any]) -> bool:
        """Whether a root that another arithmetic has met, taken of ``tensors``, may leave zero here."""
        if self._tape is not None:
            return self._plane.attached(tensors) is not None
        with _disable_current_modes():
            return bool(((root.apply(self._imaginary(tensors)) != 0) & root.vanishes).any())

    def _constant(self, func: OpOverload, sig: Signature, args: Any, kwargs: Any) -> Any:
        """Inside an island: the real result, in memory of its own where it would be a view of a live tensor."""
        self._ledger.enter(func, "cut")
        outputs = func(*args, **kwargs)
        self._ledger.leave()
        copy = lambda t: self._plane.constant(t) if self._plane.find(t) is not None else t
        if isinstance(outputs, Tensor):
            return copy(outputs)
        return type(outputs)(copy(t) if isinstance(t, Tensor) else t for t in outputs) if sig.view else outputs

    # --- rules --------------------------------------------------------------------------------------------------

    def _apply(self, func: OpOverload, tensors: list[Any], attached: list[Any], args: Any, kwargs: Any) -> Any:
        rule = lookup(func)
        if rule is None or (self._h is not None and rule.finite is None):
            return self._decompose(func, args, kwargs)
        self._ledger.enter(func, rule.family)
        WORKING.append(self._born)
        try:
            return self._by_rule(rule, func, tensors, attached, args, kwargs)
        finally:
            WORKING.pop()
            self._ledger.leave()

    def _by_rule(
        self, rule: Rule, func: OpOverload, tensors: list[Any], attached: list[Any], args: Any, kwargs: Any
    ) -> Any:
        if self._h is not None and rule.finite is not None:
            if rule.family in _EVALUATED and any(isinstance(t, Tensor) and t.is_complex() for t in tensors):
                return self._below_rounding(func, rule, args, kwargs, self._h)  # it takes a second imaginary unit
            outputs, d_outputs = rule.finite(func, args, kwargs, self._imaginary(tensors), self._h)
            self._store(outputs, d_outputs)
            return outputs
        if self._tape is not None:
            return self._recorded(rule, func, lambda: self._references(tensors, attached), args, kwargs)
        outputs, push = rule.linearize(func, args, kwargs)
        if push is not None:
            self._store(outputs, push(*self._imaginary(tensors)))
        return outputs

    def _decompose(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Carry out an operator without a rule through the simpler operators it is defined by."""
        decomposition = rules.decomposition(func)
        if decomposition is None or func in self._decomposing:  # some refer back to themselves
            rule = lookup(func)
            if self._h is None or rule is None:
                remedy = _remedy(func)
                raise UnsupportedOperatorError(func, "it has no complex-step rule and no decomposition.", remedy)
            self._ledger.enter(func, rule.family)
            try:
                return self._below_rounding(func, rule, args, kwargs, self._h)
            finally:
                self._ledger.leave()
        self._ledger.enter(func, "decomposition")
        self._decomposing.append(func)
        try:
            with self:
                return decomposition(*args, **kwargs)
        finally:
            self._decomposing.pop()
            self._ledger.leave()

    def _below_rounding(self, func: OpOverload, rule: Rule, args: Any, kwargs: Any, h: float) -> Any:
        """Finite arithmetic where only the linear map is known: complete as long as h² is lost to rounding."""
        tensors = signature(func).gather(args, kwargs)
        dtype = next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.float64)
        if h * h > 1e-3 * torch.finfo(dtype).eps:
            raise UnsupportedOperatorError(
                func,
                f"it has no formula for a finite step of h={h:g}, only one that drops h².",
                "Use a smaller h, or h=None (infinitesimal arithmetic).",
            )
        outputs, d_outputs = exact(rule.linearize)(func, args, kwargs, self._imaginary(tensors), h)
        self._store(outputs, d_outputs)
        return outputs

    # --- in-place operators -------------------------------------------------------------------------------------

    def _mutate(self, func: OpOverload, sig: Signature, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        if self._notes is not None and (sig.functional is None or self._plane.attached(tensors) is None):
            self._notes.unfit = f"{func} writes to what has no derivative"
        targets = [t for t, (*_, written) in zip(tensors, sig.tensors, strict=True) if written]
        each = [u for t in targets for u in (t if isinstance(t, (list, tuple)) else [t]) if isinstance(u, Tensor)]
        for t in each:
            if self._plane.is_constant(t) and func.overloadpacket not in _RESHAPED_IN_PLACE:
                raise UnsupportedOperatorError(
                    func,
                    "it writes into a view made by .detach(), .data or under no_grad of a tensor that is being "
                    "differentiated.",
                    "Write to the tensor itself, or clone() the detached view first.",
                )
        if self._tape is not None:
            for t in each:
                self._tape.protect(t)
        attached = self._plane.attached(tensors)
        if attached is None:
            return func(*args, **kwargs)
        if self._islands.active:
            outputs = func(*args, **kwargs)  # autograd does not see this write either: values change, derivatives stay
            if func.overloadpacket is torch.ops.aten.set_ and attached[0] is not None and not self.carries(args[0]):
                raise UnsupportedOperatorError(func, *MOVED)
            return outputs
        if func is torch.ops.aten.copy_.default:
            return self._copy(func, args, kwargs)
        if func.overloadpacket in _RESHAPED_IN_PLACE:
            return func(*args, **kwargs)  # another window onto the same memory
        if func.overloadpacket in _RESIZED:
            return self._resize(func, args, kwargs)
        if sig.functional is None and lookup(func) is not None:
            # What it overwrites is beside the point: statistics.
            return self._apply(func, tensors, attached, args, kwargs)
        if sig.functional is None:
            raise UnsupportedOperatorError(func, "it overwrites memory and has no functional form.", _remedy(func))
        kwargs = {k: v for k, v in kwargs.items() if not any(v is t for t in targets)}
        known = signature(sig.functional)
        given = known.gather(args, kwargs)
        self._overwrite(targets, self._carry_out(sig.functional, known, given, args, kwargs), given)
        alone = len(targets) == 1 and isinstance(targets[0], Tensor)
        return targets[0] if alone else None if not func._schema.returns else tuple(targets)

    def _renew(self, targets: Iterable[Any]) -> None:
        """Let what stands for detached views of what was overwritten show it."""
        before = (lambda t: None) if self._tape is None else self._tape.protect
        for t in targets:
            for u in t if isinstance(t, (list, tuple)) else [t]:
                if isinstance(u, Tensor):
                    self._plane.renew(u, before)

    # --- what existed before ------------------------------------------------------------------------------------

    def _watch(self, t: Any) -> None:
        for u in t if isinstance(t, (list, tuple)) else [t]:
            strided = isinstance(u, Tensor) and u.layout is torch.strided
            if strided and self._born not in u.untyped_storage().__dict__:
                self._before_write(u)  # type: ignore[misc]

    def _mark_born(self, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            if outputs.layout is torch.strided:
                outputs.untyped_storage().__dict__.setdefault(self._born, True)
        elif isinstance(outputs, (list, tuple)):
            for output in outputs:
                self._mark_born(output)


class Follower(Dispatch):
    """Carries imaginary parts of its own through what another one carries out."""


def _remedy(func: OpOverload) -> str:
    """What a user can do about an operator without a rule."""
    if "c10d" in func.namespace:
        return COLLECTIVE
    usual = REPORT if func.namespace in ("aten", "prims") else OWN
    return next((way for kind, way in _REMEDIES.items() if kind in func.__name__), usual)
