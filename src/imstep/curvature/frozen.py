"""A closure evaluated several times at different parameters, but always on the same batch.

A step of a second-order method needs the loss, its gradient, products with its Hessian and trial losses of *one*
function. Between the evaluations everything else that a closure may depend on is put back: the random
number generators (dropout masks, collocation points drawn inside) and every tensor that the model overwrites (running
statistics, power iterations, counters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep import Arithmetic
from imstep.complexstep.cotangents import Cotangents
from imstep.complexstep.gradients import gradients as gradients_of
from imstep.complexstep.gradients import runs_functions
from imstep.complexstep.graph import Survey, survey
from imstep.complexstep.islands import unseen
from imstep.complexstep.kernels import plain_attention
from imstep.complexstep.loss_split import split_loss
from imstep.complexstep.pattern import patterns_of
from imstep.complexstep.report import OperatorReport
from imstep.complexstep.steps import Reference
from imstep.complexstep.tape import Tape
from imstep.curvature.apart import check_others, check_still_apart
from imstep.curvature.backward import BackwardCalls
from imstep.curvature.closure import Closure, UserClosure, usable
from imstep.curvature.fully_sharded import FROM_OUTSIDE, is_sharded
from imstep.curvature.hooks import all_same
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.parameters import CHANGED, ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.recording import Recording
from imstep.curvature.repeating import require_function
from imstep.curvature.staleness import ELSEWHERE, check_anew
from imstep.curvature.state import RandomState, State, Writes, WriteWatch


class FrozenClosure:
    """A closure on one batch, evaluated at whatever the parameters are at the time.

    Args:
        closure: returns the loss, a tensor with one entry; or calls ``backward()`` on it and returns anything.
        parameters: the vector that is differentiated.
        stale: whether ``.grad`` holds gradients that the closure must not add to.
        penalty: added to the closure's loss, and so to gradients and products; None for nothing.

    Attributes:
        gradients, losses: evaluations so far with and without a backward pass.
        report: the operators that the last product met.
        user: the closure as it was given.
        penalty: as given; after the first gradient without the parameters that have none.
        used: by parameter, whether the loss depends on it, as the first gradient has shown.
    """

    def __init__(
        self, closure: Closure, parameters: ParameterVector, stale: bool = False, penalty: Penalty | None = None
    ) -> None:
        self.user, self.penalty = UserClosure(closure, parameters, stale), penalty
        self._parameters = parameters
        check_still_apart(parameters.tensors, parameters.names)
        self._random: RandomState | None = None  # where the first evaluation began
        self._random_after: RandomState | None = None
        self._writes = Writes(parameters.tensors)
        self._started = 0  # the number of the next node of autograd's graph when the evaluation began
        self._doubted = self._in_sight = False  # whether another one is to follow the next; the first is of this thread
        self._settled = False  # whether it is known which parameters the penalty is of
        self.used: list[bool] = []
        self._taken: list[bool] = []  # gradients of the last evaluation that are summed over processes already
        self.gradients = self.losses = 0
        self.report = OperatorReport(())

    # --- evaluations --------------------------------------------------------------------------------------------

    def linearise(
        self,
        observer: AbstractContextManager[Any] | None = None,
        memory_budget: int | None = None,
        keep_graph: bool = False,
        cotangents: bool = False,
    ) -> Linearisation:
        """Loss, gradient and tape at the current parameters, from one evaluation.

        Args:
            observer: a context entered around the closure; what it has seen can be differentiated further.
            memory_budget: bytes that the tape may hold; None for no limit.
            keep_graph: whether autograd's graph survives the evaluation; it does for an observer.
            cotangents: whether the tape is to know where outputs of operators on parameters have their gradients.

        Raises:
            TapeTooLargeError: the tape would not fit the budget.
            TapeChangedError: the closure overwrote what the tape needs.
        """
        patterns = None if cotangents else patterns_of(self._parameters.tensors)  # both look at the backward pass
        tape, asked = Tape(memory_budget, patterns), keep_graph
        tape.cotangents = Cotangents() if cotangents else None
        keep_graph = asked or observer is not None
        arithmetic = self.arithmetic(tape=tape, keep_graph=keep_graph)
        references: dict[int, Reference | None] = {}

        def note(at: int, gradient: Tensor) -> None:
            references[at] = arithmetic.reference(gradient)
            arithmetic.settle([gradient])

        with observer or nullcontext():
            loss, gradients = self._differentiate(arithmetic, note=note)
        self._compare(loss)  # unobserved
        split = split_loss(tape, arithmetic.reference(loss))
        if self.hook_factors is not None:  # gradients of parameters are not those at outputs times inputs
            tape.cotangents = None
        arithmetic.finish(gradients, references)
        loss, gradient = self._penalised(loss if keep_graph else loss.detach(), gradients)
        return Linearisation(loss, gradient, tape, split, arithmetic.ledger.report, self.penalty, asked)

    def product(self, direction: Tensor, h: float | None = None) -> Tensor:
        """The Hessian product with ``direction`` (n,), by an evaluation of its own; ``h`` as for ``Arithmetic``."""
        return self.loss_and_product(direction, h)[1]

    def loss_and_product(self, direction: Tensor, h: float | None = None) -> tuple[Tensor, Tensor]:
        """The loss (0-dim), and what :meth:`product` returns."""
        arithmetic = self.arithmetic(h)
        directions, part = self._parameters.unflatten(direction), lambda g: arithmetic.value(g).im
        with self.beside():
            loss, parts = self._differentiate(arithmetic, directions, arithmetic.product, part)
            self._compare(loss)
        self.report = arithmetic.report()
        product = self._parameters.flatten(parts)
        if self.penalty is None:
            return loss.detach(), product
        return self._penalised_loss(loss.detach()), product + self.penalty.factors * direction

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and gradient (n,) at the current parameters."""
        with self.beside(), self._same_state(), self.user.own_gradients(), plain_attention():
            loss, called = self.user.loss(self._numbers)
            gradients = self._gradients_of(loss, called, lambda f, inputs: gradients_of([f], inputs))
        return self._penalised(loss.detach(), gradients)

    def watched_gradient(self) -> tuple[Tensor, Tensor]:
        """As :meth:`gradient`, noting what the closure overwrites; for a first evaluation without a tape."""
        with self.beside():
            loss, gradients = self._differentiate(self.arithmetic())
            self._compare(loss)
        return self._penalised(loss.detach(), gradients)

    def loss(self) -> Tensor:
        """The loss alone (0-dim) at the current parameters: a ``backward()`` in the closure is skipped."""
        with self.beside():
            return self._penalised_loss(self.loss_with_graph().detach())

    def loss_with_graph(self, within: AbstractContextManager[Any] | None = None) -> Tensor:
        """The closure's loss (0-dim) and its graph at the current parameters, without the penalty; a ``backward()`` in
        the closure is skipped. The graph can be followed while tensors are as they are then: see :meth:`beside`.

        Args:
            within: what it is evaluated in, for a first evaluation: a :meth:`watch` or an :meth:`arithmetic`, which
                note what the closure overwrites.
        """
        self.losses += 1
        loss = self._loss_with_graph(within)
        if self._doubted:
            others = survey([loss], self._parameters.tensors, self._numbers()).others
            check_others(others, self._parameters.tensors, self._parameters.names)
        self._compare(loss)
        return loss

    def _loss_with_graph(self, within: AbstractContextManager[Any] | None = None) -> Tensor:
        # A dropout behind attention draws in the order of its output's memory, which fused kernels choose otherwise.
        with self._same_state(), self.user.own_gradients(), plain_attention(), within or nullcontext():
            return self.user.loss(self._numbers, skip=True)[0]

    def _differentiate(
        self,
        arithmetic: Arithmetic,
        directions: Sequence[Tensor | None] | None = None,
        take: Callable[..., Any] | None = None,
        part: Callable[[Tensor], Tensor | None] = lambda g: g,
        note: Callable[[int, Tensor], None] = lambda at, g: None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        watching = self.user.watching_hooks() if self._first else nullcontext()
        with watching, self.perturbed(arithmetic, directions):
            loss, called = self.user.loss(self._numbers)
            gradients = self._gradients_of(loss, called, take or arithmetic.gradient, part, note)
            self._check_sight(called.seen, arithmetic)
        return loss, gradients

    def doubt(self) -> None:
        """Let the next evaluation be followed by one of the loss, and raise where that is another one."""
        self._doubted = True

    def _compare(self, loss: Tensor) -> None:
        doubted, self._doubted = self._doubted, False
        if doubted:
            require_function(float(loss.detach()), self._once_more, [loss, *self._parameters.tensors])

    def _once_more(self, recorded: bool) -> float:
        self.compared += 1
        with self.beside(), self.perturbed(self.arithmetic(tape=Tape())) if recorded else nullcontext():
            loss = self._loss_with_graph()
            check_anew(loss, self._parameters.tensors, self._numbers() if self._in_sight else None)
            return float(loss.detach())

    def _gradients_of(
        self,
        loss: Tensor,
        called: BackwardCalls,
        take: Callable[..., Any],
        part: Callable[[Tensor], Tensor | None] = lambda g: g,
        note: Callable[[int, Tensor], None] = lambda at, g: None,
    ) -> list[Tensor | None]:
        """What ``take`` finds; where the closure has called ``backward()`` itself, ``part`` of what that has found."""
        self.gradients += 1
        self._taken, inputs = [], self._parameters.tensors
        if called.called:
            return [None if g is None else part(g) for g in usable([p.grad for p in inputs])]
        with unseen():
            constant = loss.grad_fn is None
        if constant:
            raise ValueError(
                "closure returned a loss without a graph (grad_fn is None); a gradient needs it. "
                "Return the loss itself, not loss.item() or loss.detach(), or call loss.backward() in the closure; "
                "and do not compute it under no_grad."
            )
        if self._first:
            called.look([loss])
        if runs_functions([loss]):  # which may add to .grad, bit by bit
            return usable(list(take(loss, inputs)))
        with self._parameters.taken(note) as self._taken:
            return usable(list(take(loss, inputs)))

    def _penalised_loss(self, loss: Tensor) -> Tensor:
        return loss if self.penalty is None else loss + self.penalty.value(self._parameters.get())

    def _penalised(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Loss and gradient (n,) of the closure's loss and the penalty together."""
        gradient = loss.new_empty(0) if any(self._taken) else self._parameters.flatten(gradients)
        penalty = self.settle_penalty([g is not None for g in gradients])
        if penalty is None:
            return loss, gradient
        return self._penalised_loss(loss), gradient.addcmul_(penalty.factors, self._parameters.get())

    def settle_penalty(self, used: Sequence[bool]) -> Penalty | None:
        """The penalty of the parameters that the loss has at first depended on."""
        self.used = self.used or list(used)
        if self.penalty is not None and not self._settled:
            self.penalty, self._settled = self.penalty.within(used, self.user.hook_factors), True
        return self.penalty

    def take_penalty(self, penalty: Penalty) -> None:
        """Add another penalty from now on, as it is."""
        self.penalty, self._settled = penalty, True

    def check_sight(self, outputs: Sequence[Tensor], arithmetic: Arithmetic) -> None:
        """Within :meth:`perturbed`: raise if outputs are computed from what was out of the arithmetic's sight."""
        if self._first:
            self._check_sight(survey(outputs, self._parameters.tensors, self._numbers()), arithmetic)

    def _check_sight(self, seen: Survey, arithmetic: Arithmetic) -> None:
        if any(map(is_sharded, seen.others)):
            raise ValueError(FROM_OUTSIDE)
        with unseen():
            check_others(seen.others, self._parameters.tensors, self._parameters.names)
        self._in_sight = not seen.foreign if self._first else self._in_sight
        if seen.foreign and not arithmetic.elsewhere(self._numbers()):
            raise ValueError(ELSEWHERE)

    def _numbers(self) -> range:
        """Those that this thread has given to nodes of autograd's graph since the evaluation began."""
        return range(self._started, torch.autograd._get_sequence_nr())

    # --- evaluations of another kind ----------------------------------------------------------------------------

    def watch(self, recording: Recording | None = None) -> WriteWatch:
        """A context for an evaluation, which notes what it overwrites, and how it comes to its result."""
        return WriteWatch(self._writes, recording)

    def arithmetic(
        self,
        h: float | None = None,
        tape: Tape | None = None,
        keep_graph: bool = False,
        recording: Recording | None = None,
    ) -> Arithmetic:
        """An arithmetic for an evaluation, which notes what the closure overwrites, and how it comes to its result."""
        if tape is not None:
            self._writes.follow(tape)
        return Arithmetic(h, tape, self._writes.before, keep_graph, None if recording is None else recording.note)

    @contextmanager
    def perturbed(self, arithmetic: Arithmetic, directions: Sequence[Tensor | None] | None = None) -> Iterator[None]:
        """What is evaluated inside is, on complex-step numbers and in the state of the first evaluation.

        Args:
            directions: imaginary parts of the parameters, in order; those beyond the end are no inputs. None: all are.
        """
        inputs = self._parameters.tensors
        for p, direction in zip(inputs, [None] * len(inputs) if directions is None else directions, strict=False):
            arithmetic.attach(p, direction, lent=True)
        try:
            with self._same_state(), self.user.own_gradients(), torch.enable_grad(), arithmetic:
                yield
        finally:
            for p in inputs:
                arithmetic.release(p)

    def evaluate(self) -> Any:
        """What the closure returns, as it is."""
        return self.user.call()

    # --- what the first evaluation has shown --------------------------------------------------------------------

    repeated = 0
    """Evaluations made anew for products or for a preconditioner."""

    compared = 0
    """Evaluations made anew in doubt."""

    @property
    def returned(self) -> Tensor | None:
        """What the closure returned first, 0-dim; None where that is no number."""
        return self.user.returned

    @property
    def hook_factors(self) -> Tensor | None:
        """(n,), by which hooks on parameters multiply the gradient; None where they change nothing."""
        return self.user.hook_factors

    # --- the same state for every evaluation --------------------------------------------------------------------

    def leave(self, accepted: bool) -> None:
        """End the step: random numbers and buffers as after one evaluation, buffers as before it if not accepted."""
        if self._random_after is not None:
            self._random_after.restore()
        self._writes.finish(accepted)

    def undo(self, reason: Exception | None = None) -> None:
        """End the step as if no evaluation had been made.

        Args:
            reason: why one was given up, if one was; its frames are cleared, whose generators, such as a checkpoint's
                before PyTorch 2.13, would go on steering what comes.
        """
        if reason is not None:
            clear_frames(reason.__traceback__)
        if self._random is not None:
            self._random.restore()
        self._writes.rewind()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluations inside leave no trace: random numbers and buffers are put back to what they are now."""
        now = RandomState(self._parameters.device)
        try:
            with self._writes.put_back():
                yield
        finally:
            now.restore()

    def beside(self) -> AbstractContextManager[None]:
        """Evaluations inside, but the first one, leave buffers as they are now, for what was recorded with them."""
        return nullcontext() if self._first else self._writes.put_back()

    def state(self) -> State:
        """Buffers as the last evaluation has left them; within :meth:`beside`."""
        return self._writes.state()

    @contextmanager
    def as_in(self, state: State) -> Iterator[None]:
        """A context for the graph of an evaluation that has left buffers in this state."""
        with self.beside():
            self._writes.replace(state)
            yield

    @property
    def _first(self) -> bool:
        """Whether there has been no evaluation yet."""
        return self._random_after is None

    @contextmanager
    def _same_state(self) -> Iterator[None]:
        self._started = torch.autograd._get_sequence_nr()
        if self._random is not None and not self._first:
            self._random.restore()
            self._writes.rewind()
            with self._writes.noting_assignments():
                yield
            return
        self._random, before = RandomState(self._parameters.device), self._parameters.snapshot()
        with self._writes.noting_assignments():
            yield
        if not all_same(self._parameters.memory, before):
            raise ValueError(CHANGED)
        self._random_after = RandomState(self._parameters.device)
        self._writes.keep()
