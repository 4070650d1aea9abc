"""Optimizers whose step evaluates a closure several times, and keeps or undoes everything."""

from __future__ import annotations

import functools
import inspect
import math
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.fully_sharded import is_sharded, local_part
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.processes import Processes, digest
from imstep.curvature.sharded import parameter_vector
from imstep.curvature.shared import SharedBatch
from imstep.optim.arguments import check_device
from imstep.optim.averaging import Average, Averaging
from imstep.optim.box import Box
from imstep.optim.closure_needed import needs_closure
from imstep.optim.examination import Examination
from imstep.optim.memory import Memory
from imstep.optim.micro_batches import MicroBatches
from imstep.optim.pace import Pace, option_of, options_of
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.saving import SavedOptimizer, check_saved_forms, saved_forms
from imstep.optim.sharing import shared_batch, state_digest
from imstep.optim.stationarity import Stationarity
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.strategies import short

_OF_OTHERS = ("name", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Options of groups that schedulers and loggers write for themselves."""

@functools.cache
def _arguments(kind: type) -> frozenset[str]:
    """Names of a constructor's arguments."""
    return frozenset(inspect.signature(kind).parameters)


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient was not finite in several steps in a row."""


class StepwiseOptimizer(SavedOptimizer, ABC):
    """The shell around steps: records, costs, undoing, saving.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone.
        memory: before the first step.
        options: of the parameter groups: ``lr`` and ``weight_decay``.
        max_step_norm: the longest step, > 0; None for no bound.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.
        average: of the iterates; None for none.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first, which its type leaves out.
        cost: everything spent so far.
    """

    _box: Box | None = None
    """Bounds on the parameters, where there are any."""

    _processes: Processes | None = None
    """Those that share the batches of steps, where there are any."""

    def __init__(
        self,
        params: Iterable[Any],
        memory: Memory,
        *,
        options: dict[str, Any],
        max_step_norm: float | None,
        max_refusals: int,
        average: Averaging | None,
    ) -> None:
        if max_refusals < 1:
            raise ValueError(f"max_refusals is at least 1, got {max_refusals}.")
        if max_step_norm is not None and not max_step_norm > 0:
            raise ValueError(f"max_step_norm, a length, is positive, or None for no bound; got {max_step_norm}.")
        self._longest = math.inf if max_step_norm is None else float(max_step_norm)
        super().__init__(params, options)
        self._parameters = self._vector()
        self._memory, self._max_refusals = memory, max_refusals
        self._left: list[tuple[weakref.ref[Tensor], int]] = []
        self._stepping = False
        self._average = None if average is None else Average(average)
        self.last_step: StepRecord = None  # type: ignore[assignment]  # so that nobody need ask for it after a step
        self.cost = Cost()
        self._mark()

    @property
    def processes(self) -> int:
        """How many processes share the batches of steps: those of ``process_group``, or 1."""
        return 1 if self._processes is None else self._processes.size

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters.

        Args:
            param_group: ``params``, and options in place of the constructor's; those that schedulers write, and a
                ``name``, may be there.

        Raises:
            ValueError: the group has options of which no use would be made, or one that is out of range.
        """
        unused = sorted(set(param_group) - {"params", "param_names", *self.defaults, *_OF_OTHERS})
        if unused:
            name, options = type(self).__name__, " and ".join(o for o in self.defaults if o != "differentiable")
            raise ValueError(
                f"a parameter group has options that {name} makes no use of: {', '.join(unused)}. "
                f"Leave them out; groups may differ in {options}."
            )
        for name in ("lr", "weight_decay"):
            option_of({**self.defaults, **param_group}, name)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, so that copies and pickles go on as the original does; copies have no ``.grad``."""
        # Schedulers put a step in place that takes that of the original.
        own = {name: value for name, value in self.__dict__.items() if name != "step"}
        state = {name: value for name, value in own.items() if not name.startswith("_optimizer_")}
        return {**state, "_left": [], "_stepping": False}

    def __repr__(self) -> str:
        parameters = self._parameters
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for _, dtype in parameters.forms)
        parts = [f"{parameters.size:,} parameters", f"{' and '.join(dtypes)} on {parameters.device}"]
        for name in ("lr", "weight_decay"):
            values = dict.fromkeys(f"{option_of(group, name):.6g}" for group in self.param_groups)
            parts.append(f"{name}={' and '.join(values)}")
        parts += [] if math.isinf(self._longest) else [f"max_step_norm={self._longest:.6g}"]
        parts += [f"{name}={short(strategy)}" for name, strategy in self._chosen().items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _chosen(self) -> dict[str, Any]:
        """Strategies by the names of the constructor's arguments."""
        return {}

    @abstractmethod
    def _attempt(self, frozen: FrozenClosure) -> StepAttempt:
        """A step on a batch, not begun yet."""

    def _parts(self) -> dict[str, Any]:
        """What a step changes besides the memory, to be saved, or put back where the step fails."""
        return {}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        """The inverse of :meth:`_parts`; a part that is missing is a KeyError."""

    def _adopt(self, parameters: ParameterVector) -> None:
        """Take up other parameters; the last step and the average do not fit them."""
        if self._average is not None:
            self._average.forget()
        self._parameters = parameters
        self._memory = replace(self._memory, last_move=None, column_norms=None, previous=None, earlier=None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty ``.grad`` of the parameters, as every optimizer does; in a closure also of what stands for shards."""
        super().zero_grad(set_to_none)
        for p, shown in zip(self._parameters.tensors, self._parameters.evaluated.tensors, strict=True):
            if shown is not p:
                shown.grad = None

    @needs_closure
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss, a tensor with one entry, or calls ``backward()`` on it, as for L-BFGS. The sum of
                all that ``backward()`` was called on is then the loss, whatever is returned. It is evaluated several
                times. For a batch in pieces a :class:`MicroBatches`, or a list of closures, whose losses add up.

        Returns:
            What the closure returned before the step, if that is a number, else the loss; 0-dim, detached. ``.grad`` of
            the parameters is the loss's gradient there.

        Raises:
            TypeError: no closure.
            ValueError: the closure gave no scalar with a graph, or one that no parameter influences, or does what has
                no meaning here, such as clipping gradients; see docs/closures.md.
            NonFiniteLossError: too many steps in a row met a loss or gradient that is not finite.
        """
        with self._together():
            return self._take(self._attempt(self._batch(closure)))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A context for a step of all processes; of one alone it is none."""
        if self._processes is None:
            yield
            return
        self._follow_parameters()
        with self._processes.interrupted_together(), self._parameters.shown():
            yield

    @contextmanager
    def averaged(self, model: nn.Module | None = None) -> Iterator[None]:
        """A context in which the parameters are the average of the iterates, for evaluations and for saving the model.

            with optimizer.averaged():
                evaluate(model)

        Afterwards they are bit for bit what they were, also where an exception ends it. Before the first step they stay
        as they are. Buffers are those of the last iterate: for a long average over batch normalisation let
        ``torch.optim.swa_utils.update_bn`` compute them anew inside.

        Args:
            model: whose buffers are put back afterwards, too; None where nothing inside changes them.

        Raises:
            ValueError: the optimizer keeps no average.
            RuntimeError: the parameters are the average already.
        """
        if self._average is None:
            raise ValueError(
                f"this {type(self).__name__} keeps no average. Build it with average=ExponentialAverage(), of "
                "imstep.optim."
            )
        self._follow_parameters()
        with self._average.swapped(self._parameters, model):
            yield

    def examine(
        self,
        closure: Callable[[], Any],
        stationary: Callable[[float, Stationarity], bool],
        typical: Tensor | None = None,
        may_leave: bool = True,
        newton: bool = False,
    ) -> StepRecord:
        """Look at the present point, and leave it only where that pays: see :class:`Examination`."""
        if self._processes is not None:
            raise ValueError(
                "a point is examined by one process alone, and this optimizer has a process_group. Build another one "
                "without, in one process, and examine the loss of the whole batch."
            )
        frozen = self._frozen(closure)
        where = self._memory, self._parameters, frozen
        self._take(Examination(*where, stationary, typical, may_leave, self._box, newton))
        assert self.last_step is not None
        return self.last_step

    def _frozen(self, closure: Any) -> FrozenClosure:
        """The closure on its batch, at the parameters as they are now; a batch in pieces is evaluated as one."""
        where = self._where()
        pieces = MicroBatches.of(closure)
        whole = closure if pieces is None else pieces.checked()
        return FrozenClosure(whole, *where)

    def _batch(self, closure: Any) -> Any:
        """The closure on its batch, alone or with those of other processes."""
        return self._frozen(closure) if self._processes is None else self._shared(closure)

    def _shared(self, closure: Any, whole: bool = True) -> SharedBatch:
        """The closure as a part of the batch of all processes; ``whole``: its pieces are evaluated at once."""
        assert self._processes is not None
        state = lambda: (digest(self._fixed()), state_digest(repr(self), self._memory))
        return shared_batch(self._processes, closure, self._where, state, whole)

    def _fixed(self) -> list[Tensor]:
        """Frozen parameters that all processes hold alike, on the device of the others."""
        every = (p for group in self.param_groups for p in group["params"] if not p.requires_grad)
        here = (p for p in every if p.device == self._parameters.device and p.layout is torch.strided)
        return [p for p in here if not is_sharded(p)]

    def _where(self) -> tuple[ParameterVector, bool, Penalty | None]:
        """The parameters as they are now, whether they hold gradients, and the penalty; unless no step can be taken."""
        if self._average is not None and self._average.shown:
            raise RuntimeError("a step was called where the parameters are the average. Leave averaged() first.")
        if self._stepping:
            raise RuntimeError("a step was called in the closure of a step of the same optimizer. Call it outside.")
        self._check_groups()
        self._follow_parameters()
        return self._parameters, self._holds_gradients(), self._penalty()

    def _penalty(self) -> Penalty | None:
        """What weight decay adds to the loss."""
        return Penalty.of(options_of(self.param_groups, "weight_decay", self._parameters), self._parameters)

    def _pace(self) -> Pace:
        """What is taken of a step."""
        return Pace.of(options_of(self.param_groups, "lr", self._parameters), self._parameters, self._longest)

    def _check_groups(self) -> None:
        """Raise where an argument of the constructor was written into a group, as skorch's ``set_params`` does."""
        arguments = _arguments(type(self)) - {*self.defaults, "params"}
        late = sorted(arguments & set().union(*self.param_groups))
        if late:
            raise ValueError(
                f"a parameter group holds {', '.join(late)}, which {type(self).__name__} takes when it is made and "
                "does not read from groups. Make the optimizer anew with it, and delete it from the group."
            )

    def _holds_gradients(self) -> bool:
        """Whether ``.grad`` holds anything but zeros and what the last step has left."""
        left = {id(g): version for ref, version in self._left if (g := ref()) is not None}
        found = [p.grad for p in self._parameters.tensors if p.grad is not None]
        return any(left.get(id(g)) != g._version and bool((local_part(g) != 0).any()) for g in found)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context for a step: no other begins in it, and autocast is for the closure only."""
        self._stepping = True
        try:
            with torch._C._DisableAutocast():
                yield
        finally:
            self._stepping = False

    def _take(self, attempt: StepAttempt, spent: Cost | None = None) -> Tensor:
        """Run a step, for which ``spent`` was paid before; keep it, or leave everything as it was."""
        started = time.perf_counter()
        before = self._parts()
        if self._memory.steps == 0:
            attempt.doubt()
        try:
            with self._alone():
                record, memory = attempt.run()
        except BaseException:  # an interrupt as well: the next step finds everything as this one did
            attempt.undo()
            self._load_parts(before)
            raise
        attempt.leave()
        if record.outcome is StepOutcome.NON_FINITE:
            self._load_parts(before)
        elif self._average is not None:
            self._average.take(self._parameters)
        if record.accepted:
            memory = replace(memory, previous=attempt.origin, size=self._parameters.norm())
        self._memory = replace(memory, steps=memory.steps + 1)
        record = replace(record, cost=record.cost + (spent or Cost()) + Cost(losses=attempt.compared))
        self.last_step = replace(record, new_penalty=attempt.penalty_now(), seconds=time.perf_counter() - started)
        self.cost = self.cost + record.cost
        loss, gradient = attempt.of_closure
        self._left = []
        for p, g in zip(self._parameters.tensors, self._parameters.gradients(gradient), strict=True):
            p.grad = g
            self._left.append((weakref.ref(p.grad), p.grad._version))
        if memory.refusals >= self._max_refusals:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite in {memory.refusals} steps in a row "
                f"(last loss: {record.loss}). "
                "Parameters are unchanged since. Look for an empty batch, a logarithm or division at zero, or bad data."
            )
        return loss if attempt.returned is None else attempt.returned

    def _vector(self) -> ParameterVector:
        vector = parameter_vector((p for group in self.param_groups for p in group["params"]), self._processes)
        check_device(vector.device)
        return vector

    def _follow_parameters(self) -> None:
        """Take up parameters that were added, frozen, unfrozen, moved or converted since."""
        every = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
        now, own = {id(p): (p.shape, p.dtype, p.device) for p in every}, self._parameters
        if list(now.items()) != [(id(p), (*form, own.device)) for p, form in zip(own.tensors, own.forms, strict=True)]:
            self._adopt(self._vector())

    def _entry(self) -> dict[str, Any]:
        entry = {
            "memory": self._memory.to_dict(),
            "cost": asdict(self.cost),
            **saved_forms(self._parameters),
            **self._parts(),
        }
        if self._average is not None:
            entry["average"] = self._average.state_dict()
        return tree_map_only(Tensor, lambda t: _alone(self._parameters.whole(t)), entry)

    def _load_entry(self, entry: dict[str, Any]) -> None:
        self._follow_parameters()
        check_saved_forms(entry, self._parameters)
        try:
            memory, cost = Memory.from_dict(entry["memory"]), Cost(**entry["cost"])
            parts = {name: entry[name] for name in self._parts()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"this state is damaged or of another version of the library: {error}.") from error
        self._load_parts(parts)
        self._memory, self.cost = memory.held(self._parameters.own), cost
        if self._average is not None:
            self._average.forget()  # that of a state without one begins with it
            if "average" in entry:
                self._average.load_state_dict(tree_map_only(Tensor, self._parameters.own, entry["average"]))


def _alone(t: Tensor) -> Tensor:
    """``t`` in memory of its own, as formats ask for that write tensors by their memory."""
    whole = t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole else t.clone(memory_format=torch.contiguous_format)
