"""Optimizers whose step evaluates a closure several times, and keeps or undoes everything."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.optim.box import Box
from imstep.optim.examination import Examination
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.stationarity import Stationarity
from imstep.optim.step_attempt import StepAttempt


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient was not finite in several steps in a row."""


class StepwiseOptimizer(torch.optim.Optimizer, ABC):
    """The shell around steps: records, costs, undoing, saving.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone.
        memory: before the first step.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first.
        cost: everything spent so far.
    """

    _key: ClassVar[str]
    """Under which a saved state keeps what is not PyTorch's."""

    _box: Box | None = None
    """Bounds on the parameters, where there are any."""

    def __init__(self, params: Iterable[Any], memory: Memory, max_refusals: int) -> None:
        if max_refusals < 1:
            raise ValueError(f"max_refusals is at least 1, got {max_refusals}.")
        super().__init__(params, {})
        self._parameters = self._vector()
        self._memory, self._max_refusals = memory, max_refusals
        self.last_step: StepRecord | None = None
        self.cost = Cost()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters.

        Raises:
            ValueError: the group has options, such as a learning rate, of which no use would be made.
        """
        unused = sorted(set(param_group) - {"params", "param_names"})
        if unused:
            name = type(self).__name__
            raise ValueError(
                f"a parameter group has options that {name} makes no use of: {', '.join(unused)}. "
                "Leave them out; there is no learning rate, and a penalty on weights belongs in the loss."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, so that copies and pickles go on as the original does."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}

    @abstractmethod
    def _attempt(self, frozen: FrozenClosure) -> StepAttempt:
        """A step on a batch, not begun yet."""

    def _parts(self) -> dict[str, Any]:
        """What a step changes besides the memory, to be saved, or put back where the step fails."""
        return {}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        """The inverse of :meth:`_parts`; a part that is missing is a KeyError."""

    def _adopt(self, parameters: ParameterVector) -> None:
        """Take up other parameters; the last step does not fit them."""
        self._parameters = parameters
        self._memory = replace(self._memory, last_move=None, column_norms=None)

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss, a tensor with one entry. It may also call ``zero_grad()`` and
                ``loss.backward()``, as for L-BFGS. It is evaluated several times.

        Returns:
            The loss before the step, 0-dim, detached. ``.grad`` of the parameters is the gradient there.

        Raises:
            TypeError: no closure.
            ValueError: the closure returned no scalar with a graph, or one that no parameter influences.
            NonFiniteLossError: too many steps in a row met a loss or gradient that is not finite.
        """
        return self._take(self._attempt(self._frozen(closure)))

    def examine(
        self,
        closure: Callable[[], Any],
        stationary: Callable[[float, Stationarity], bool],
        typical: Tensor | None = None,
        may_leave: bool = True,
    ) -> StepRecord:
        """Look at the present point without a step, unless it proves a saddle: see :class:`Examination`."""
        frozen = self._frozen(closure)
        self._take(Examination(self._memory, self._parameters, frozen, stationary, typical, may_leave, self._box))
        assert self.last_step is not None
        return self.last_step

    def _frozen(self, closure: Callable[[], Any] | None) -> FrozenClosure:
        """The closure on its batch, at the parameters as they are now."""
        if closure is None:
            name = type(self).__name__
            raise TypeError(f"{name}.step needs a closure that evaluates the model and returns the loss.")
        self._follow_parameters()
        return FrozenClosure(closure, self._parameters)

    def _take(self, attempt: StepAttempt) -> Tensor:
        """Run a step; keep it, or leave everything as it was."""
        started = time.perf_counter()
        before = self._parts()
        try:
            record, memory = attempt.run()
        except BaseException:  # an interrupt as well: the next step finds everything as this one did
            attempt.undo()
            self._load_parts(before)
            raise
        attempt.leave()
        if record.outcome is StepOutcome.NON_FINITE:
            self._load_parts(before)
        self._memory = replace(memory, steps=memory.steps + 1)
        self.last_step = replace(record, seconds=time.perf_counter() - started)
        self.cost = self.cost + record.cost
        loss, gradient = attempt.start
        for p, g in zip(self._parameters.tensors, self._parameters.unflatten(gradient), strict=True):
            p.grad = g.clone()
        if memory.refusals >= self._max_refusals:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite in {memory.refusals} steps in a row "
                f"(last loss: {record.loss}). "
                "Parameters are unchanged since. Look for an empty batch, a logarithm or division at zero, or bad data."
            )
        return loss

    def _vector(self) -> ParameterVector:
        return ParameterVector(p for group in self.param_groups for p in group["params"])

    def _follow_parameters(self) -> None:
        """Take up parameters that were added, frozen or unfrozen since."""
        parameters = self._vector()
        if list(map(id, parameters.tensors)) != list(map(id, self._parameters.tensors)):
            self._adopt(parameters)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit; tensors, numbers, strings, lists and dictionaries."""
        state = super().state_dict()
        state[self._key] = {
            "memory": self._memory.to_dict(),
            "cost": asdict(self.cost),
            "shapes": [list(p.shape) for p in self._parameters.tensors],
            **self._parts(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; strategies are those given to the constructor.

        Raises:
            ValueError: the state belongs to another optimizer, or to other parameters.
        """
        if self._key not in state_dict:
            raise ValueError(
                f"this state was not saved by {type(self).__name__} (it has no entry {self._key!r}). "
                "Load it into the optimizer that saved it."
            )
        own = state_dict[self._key]
        self._follow_parameters()
        shapes = [list(p.shape) for p in self._parameters.tensors]
        if own.get("shapes") != shapes:
            raise ValueError(
                f"this state belongs to parameters of shapes {own.get('shapes')}, the optimizer has {shapes}. "
                "Load it into an optimizer of the same model, with the same parameters frozen."
            )
        try:
            memory, cost = Memory.from_dict(own["memory"]), Cost(**own["cost"])
            parts = {name: own[name] for name in self._parts()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"this state is damaged or of another version of the library: {error}.") from error
        self._load_parts(parts)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != self._key})
        self._memory, self.cost = memory, cost
