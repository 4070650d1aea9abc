"""What a mode does to record an evaluation on a tape: anew, or as an earlier one of the same structure did."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.carrier import Carrier
from imstep.complexstep.foresight import Gathering, Notes, observer_of
from imstep.complexstep.islands import Islands, unseen
from imstep.complexstep.jumps import Jumps
from imstep.complexstep.pattern import Foreseen
from imstep.complexstep.program import Anatomy
from imstep.complexstep.registry import Rule, lookup, signature
from imstep.complexstep.report import Ledger
from imstep.complexstep.roots import Roots
from imstep.complexstep.rules.forms import WORKING
from imstep.complexstep.steps import LOSS_OPERATORS, Step
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane

_evaluations = itertools.count()
_OF_LOSSES = {id(op) for op in LOSS_OPERATORS}


class Recorder(Carrier):
    """Carries out the operators of an evaluation whose linear maps go onto a tape."""

    def __init__(self, plane: Plane, islands: Islands, ledger: Ledger, tape: Tape | None) -> None:
        super().__init__(plane, islands, tape)
        self._ledger, self._born = ledger, f"_imstep_born_{next(_evaluations)}"
        self._roots: Roots | None = None
        self._jumps: Jumps | None = None
        self._given: Any = None  # the arguments of the operator, where they may be of subclasses
        self._observer: Notes | Gathering | None = None  # of the forward pass
        self._notes: Notes | None = None  # of the backward pass that is being made

    def _is(self, foreseen: Foreseen, args: Any, kwargs: Any) -> bool:
        """Whether the operator of a foreseen step is met again, with arguments like those."""
        if foreseen.tensors is None or self._roots is not None or self._jumps is not None or self._islands.active:
            return False
        find, count = self._plane.find, len(args)
        for at, name, slot, window in foreseen.tensors:
            t = args[at] if at < count else kwargs.get(name)
            if slot is None:
                if isinstance(t, Tensor) and (t.is_complex() or find(t) is not None):
                    return False
            elif not isinstance(t, Tensor) or find(t) != slot or not window.fits(t):  # type: ignore[union-attr]
                return False
        return foreseen.step.backward == self._islands.final

    def _as_foreseen(self, func: OpOverload, step: Step, args: Any, kwargs: Any) -> Any:
        """Carry out the operator of a foreseen step."""
        rule = lookup(func)
        assert rule is not None
        self._ledger.enter(func, rule.family)
        WORKING.append(self._born)
        try:
            return self._recorded(rule, func, lambda: step.inputs, args, kwargs, step)
        finally:
            WORKING.pop()
            self._ledger.leave()

    def _recorded(
        self, rule: Rule, func: OpOverload, inputs: Any, args: Any, kwargs: Any, foreseen: Step | None = None
    ) -> Any:
        """Apply a rule and record its map."""
        outputs, push = rule.linearize(func, args, kwargs)
        if push is None:
            if self._notes is not None:
                self._notes.note(func, args, kwargs, outputs)
            return outputs
        assert self._tape is not None
        defined = self._define(outputs)
        if foreseen is not None and foreseen.outputs == defined:
            step, known = foreseen.again(push, self._node()), True
        else:
            step, known = self._step(func, push, inputs(), defined), False
        if kwargs:
            step.alpha = kwargs.get("alpha", 1)
        if id(func) in _OF_LOSSES and not step.backward:
            step.args, step.result = self._given or args, outputs
        self._tape.record(step, known)
        if self._notes is not None:
            self._notes.note(func, args, kwargs, outputs, step)
        elif not self._islands.final:
            self._see(func, args, kwargs, outputs, defined)
        return outputs

    def _see(self, func: OpOverload, args: Any, kwargs: Any, outputs: Any, defined: Any) -> None:
        """Show a step of the forward pass to the observer."""
        assert self._tape is not None
        number = len(self._tape.steps) - 1
        if number == 0:
            self._observer = observer_of(self._tape, self._plane)
        if self._observer is not None:
            if self._observer.pattern is self._tape.pattern:
                self._observer.met(number, signature(func), args, kwargs, outputs, defined)
            else:
                self._observer = None

    def gradient(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        """The gradient that is to be differentiated: by the program of an earlier one, where it is known to do."""
        observer, self._observer = self._observer, None
        if observer is None or not self._is_plain(inputs):
            return self._islands.gradient([loss], inputs)
        anatomy = Anatomy.of(loss, inputs)
        if isinstance(observer, Notes):
            return self._noted(observer, loss, inputs, anatomy)
        found = self._rerun(observer, inputs, anatomy)
        if found is None:
            observer.pattern.looked_in_vain()
            return self._islands.gradient([loss], inputs)
        observer.pattern.ran()
        return found

    def _noted(self, notes: Notes, loss: Tensor, inputs: list[Tensor], anatomy: Anatomy) -> list[Tensor | None]:
        """The gradient, and the program that it is made by from now on."""
        assert self._tape is not None
        if anatomy.runs_code:
            notes.unfit = "a Function of the user's is in the graph"
        self._notes = notes
        try:
            gradients = self._islands.gradient([loss], inputs)
        finally:
            self._notes = None
        if self._tape.pattern is notes.pattern:
            notes.pattern.program = notes.finish(anatomy, gradients)
            notes.pattern.plain = notes.pattern.program is None
        return gradients

    def conclude(self, failed: bool = False) -> None:
        """The evaluation is over."""
        observer, self._observer = self._observer, None
        if observer is not None and not failed:  # the gradient has come about in another way: backward() in a closure
            observer.pattern.looked_in_vain()

    def _is_plain(self, inputs: list[Tensor]) -> bool:
        """Whether a backward pass runs no code but PyTorch's own, as far as its graph does not show."""
        with unseen():
            hooked = any(t._backward_hooks for t in inputs)
        watched = self._roots is not None or self._jumps is not None or torch.is_anomaly_enabled()
        watched = watched or torch._C._len_torch_dispatch_stack() > 1  # other modes want to see it as well
        return not (hooked or watched or self._islands.hooked or self._islands.touched)

    def _rerun(self, gathered: Gathering, inputs: list[Tensor], anatomy: Anatomy) -> list[Tensor | None] | None:
        """The gradients by a program; None where the forward pass, its graph or a form is not as it was."""
        assert self._tape is not None
        if not gathered.complete(self._tape) or anatomy.form != gathered.program.form or anatomy.runs_code:
            return None
        mark, values = self._tape.mark(), gathered.values
        values.update(zip(gathered.pattern.inputs, inputs, strict=True))
        WORKING.append(self._born)
        try:
            gradients = gathered.program.run(values, self._tape, anatomy.numbers, self._ledger)
        except (RuntimeError, LookupError, ValueError):  # autograd will tell if it is not for the program
            self._tape.rewind(mark)
            return None
        finally:
            WORKING.pop()
        self._tape.static = True
        for g, ref in zip(gradients, gathered.program.results, strict=True):
            if g is not None and ref is not None and ref.slot >= 0:
                self._plane.name(g, ref.slot)
        return gradients
