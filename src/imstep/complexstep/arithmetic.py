"""The arithmetic: every operator that runs while it is active is carried out on complex-step numbers.

It sits below autograd (``TorchDispatchMode``), so autograd records real formulas, and the backward pass it derives
from them runs on complex-step numbers as well: the gradient that comes out is the analytic continuation of
the gradient, and its imaginary part is the Hessian-vector product. ``create_graph`` and ``torch.func`` transforms
*inside* the loss arrive here as ordinary operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from traceback import walk_tb
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from imstep.complexstep.dispatch import Dispatch
from imstep.complexstep.errors import COLD, MOVED, UnsupportedOperatorError
from imstep.complexstep.gradients import runs_functions
from imstep.complexstep.islands import Islands, plain, unseen
from imstep.complexstep.report import Ledger, OperatorReport
from imstep.complexstep.scripted import unoptimised
from imstep.complexstep.steps import Reference, Step
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import ComplexStepTensor, Plane, entries_behind, whole

_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"
_OF_NO_NODE = -2  # no operator of the user's


class Arithmetic:
    """One evaluation on complex-step numbers; use as a context around the code to differentiate.

    Args:
        h: None for infinitesimal arithmetic (h² terms dropped), or the step of finite arithmetic, h > 0.
        tape: where to record the linear maps instead of applying them (infinitesimal arithmetic only).
        before_write: called with each tensor that an operator is about to overwrite and that existed before this
            evaluation, such as a model's buffers, and with each generator of the user's that one is about to draw from.
        keep_graph: whether autograd's graph survives the gradient, for further backward passes.
        witness: called with each operator of more than a view that was carried out, as the user's code asked for it:
            the operator, its signature, its tensor arguments in the order of that, all arguments, and the outputs.

    Attributes:
        ledger: tells the operators that were met.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> with Arithmetic() as arithmetic:
        ...     z = arithmetic.number(x, torch.tensor([1.0, 0.0], dtype=torch.float64))
        ...     y = (z ** 3).sum()
        >>> arithmetic.value(y).im
        tensor(3., dtype=torch.float64)
    """

    def __init__(
        self,
        h: float | None = None,
        tape: Tape | None = None,
        before_write: Callable[..., None] | None = None,
        keep_graph: bool = False,
        witness: Callable[..., None] | None = None,
    ) -> None:
        if h is not None and not h > 0:
            raise ValueError(f"h must be positive, got {h}. Use h=None for infinitesimal arithmetic.")
        if h is not None and tape is not None:
            raise ValueError("a tape records linear maps; finite arithmetic (h given) has none. Use h=None.")
        self.ledger = Ledger()
        self._plane = Plane()
        self._tape, self._before_write, self._keep_graph = tape, before_write, keep_graph
        self._islands = Islands(self._plane, self.ledger, keep_graph, before_write)
        self._dispatch = Dispatch(self._plane, self._islands, self.ledger, h, tape, before_write, witness)
        self._islands.at_last = WeakMethod(self._dispatch.begin_last)  # a cycle would keep tapes alive
        self._inputs: list[tuple[Tensor, torch.UntypedStorage]] = []  # and the memory in which each is
        self._stack = ExitStack()
        self._cold = False  # whether PyTorch's compiler was not loaded when the evaluation began

    def __enter__(self) -> Arithmetic:
        torch.clear_autocast_cache()  # casts made before would lack the imaginary part
        self._cold = "torch._dynamo" not in sys.modules
        with ExitStack() as stack:
            if not self._cold:  # compiled code runs uncompiled: its kernels have no derivative
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(unoptimised())
            stack.enter_context(self._dispatch)
            stack.enter_context(self._islands)
            self._stack = stack.pop_all()
        self._plane.open = True
        self.ledger.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._plane.open = False
        self.ledger.stop()
        self._stack.close()
        torch.clear_autocast_cache()
        if self._tape is None or exc[0] is not None:
            self._dispatch.conclude(failed=exc[0] is not None)
        if self._cold and any("_dynamo" in frame.f_code.co_filename for frame, _ in walk_tb(exc[2])):
            raise UnsupportedOperatorError("torch.compile", *COLD) from exc[1]
        raised, self._dispatch.raised = self._dispatch.raised, None
        inputs, self._inputs = self._inputs, []
        with unseen():  # whoever watches the closure for looks at memory
            moved = any(t.untyped_storage()._cdata != memory._cdata for t, memory in inputs)
        if exc[0] is None and moved:
            raise UnsupportedOperatorError("closure", *MOVED)
        if raised is not None and str(exc[1]).startswith(_TORCHSCRIPT) and str(exc[1]).endswith("RuntimeError: \n"):
            raise raised from exc[1]

    def attach(self, t: Tensor, im: Tensor | None = None, lent: bool = False) -> None:
        """Perturb ``t`` by ``im`` (shape of ``t``); on a tape ``t`` becomes the next input, without ``im``.

        Inputs may be parts of one storage, as the weights of a recurrent network on a GPU are.

        Args:
            lent: whether neither ``im`` nor ``t`` is overwritten before :meth:`release`; else ``im`` is copied.
        """
        known = self._plane.find(t)
        self._inputs.append((t, t.untyped_storage()))
        if self._tape is not None:
            slot = self._tape.input(t)
            filled = entries_behind(t) == t.numel()
            if known is None and filled and not (t.is_conj() or t.is_neg()):
                self._plane.name(t, slot)
                return
            if known is None:
                known = self._tape.define(whole(t))
                self._plane.name(t, known)
            target, write = self._tape.reference(known, t), torch.ops.aten.copy_.default
            self._tape.record(Step(None, [slot], None, target, write, _OF_NO_NODE, False))
        elif im is not None:
            with unseen(), torch.no_grad():
                if known is not None:
                    self._plane.write(t, im)
                elif not (lent and self._plane.lend(t, im)):
                    self._plane.put(t, im.to(t.dtype).clone())

    def number(self, re: Tensor, im: Tensor) -> Tensor:
        """A copy of ``re`` with the imaginary part ``im``; it does not require gradients."""
        with unseen():
            t = plain(re).detach().clone()
        self.attach(t, im)
        return t

    def value(self, t: Tensor) -> ComplexStepTensor:
        """What ``t`` holds: the tensor itself and a view of its imaginary part."""
        return ComplexStepTensor(t, self._plane.get(plain(t)))

    def gradient(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        """The gradient of ``loss``, whose imaginary part is the derivative of the gradient; None where independent."""
        return self._dispatch.gradient(loss, inputs) if loss.requires_grad else [None] * len(inputs)

    def product(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        """The imaginary part of :meth:`gradient` alone; the real one is dropped part by part as it comes."""
        if runs_functions([loss]):  # they may look at .grad of an input, or write to it
            return [self._imaginary_alone(g) for g in self.gradient(loss, inputs)]
        handles = [t.register_hook(self._imaginary_alone) for t in inputs]
        try:
            return self.gradient(loss, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _imaginary_alone(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.layout is not torch.strided:
            return gradient
        self.settle([gradient])
        im = self.value(gradient).im
        return gradient.new_zeros(()).expand(gradient.shape) if im is None else im

    def pullback(
        self, outputs: Sequence[Tensor], inputs: list[Tensor], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """After the evaluation: real gradients of the outputs' inner product with ``weights``; None where independent.

        Autograd's graph is used up unless it is to be kept.
        """
        with self._islands:
            return self._islands.gradient(outputs, inputs, weights)

    def transpose(self, output: Tensor, inputs: list[Tensor], tape: Tape) -> list[Tensor | None]:
        """After the evaluation: record the backward pass alone on ``tape``, from a weight of ``output`` to gradients.

        Returns:
            The gradients for zero weights, real and without meaning; None where ``output`` does not depend on an input.
        """
        backward = Arithmetic(None, tape, self._before_write, self._keep_graph)
        backward._islands.follow(self._islands)
        weight = torch.zeros_like(output)
        backward.attach(weight)
        with backward:
            gradients = backward._islands.gradient([output], inputs, [weight])
        backward.finish(gradients)
        return gradients

    def finish(self, outputs: list[Tensor | None], references: dict[int, Reference | None] | None = None) -> None:
        """End the recording: ``outputs`` are what the tape computes.

        Args:
            references: what some of them, by number, were on the tape, where something else stands in their place now.
        """
        assert self._tape is not None
        known = references or {}
        found = [None if t is None else self._dispatch.reference(t) for t in outputs]
        self._tape.finish([known.get(at, reference) for at, reference in enumerate(found)])
        self.settle(outputs)
        self._dispatch.conclude()

    def settle(self, results: Sequence[Tensor | None]) -> None:
        """The evaluation has come to ``results``: warn where their derivative does not exist and is taken as zero."""
        self._dispatch.settle(results)

    def reference(self, t: Tensor) -> Reference | None:
        """What ``t`` is on the tape; None for a constant."""
        return self._dispatch.reference(t)

    def elsewhere(self, numbers: range) -> bool:
        """Whether autograd has made nodes in threads of its own, as on a GPU, where gradients are part of the loss.

        Args:
            numbers: those that this thread has given to nodes of autograd's graph.
        """
        steps = [] if self._tape is None else self._tape.steps
        return any(not step.backward and step.node >= 0 and step.node not in numbers for step in steps)

    def take_branch(self, sign: int) -> None:
        """Within another arithmetic, let magnitudes that vanish be numbers times ``sign``, 1 (by default) or -1.

        |x| is then smooth at 0, and the mean over both signs is that of what is even in x.
        """
        self._dispatch.branch = sign

    @property
    def branched(self) -> bool:
        """Whether a magnitude has vanished within another arithmetic."""
        return self._dispatch.branched

    @property
    def passes(self) -> bool:
        """Whether the code that was evaluated has asked autograd for a backward pass."""
        return self._islands.passes

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How often each operator was met, by (name, how it was treated)."""
        return self.ledger.counts

    def report(self) -> OperatorReport:
        """Which operators were met so far, and how they were differentiated, and what time each took."""
        return self.ledger.report()

    def release(self, t: Tensor) -> None:
        """Forget the imaginary part of ``t``, and what stood for detached views of it."""
        self._plane.forget(t)
