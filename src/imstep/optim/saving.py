"""Optimizers that save more than a state per parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from imstep.curvature.parameters import ParameterVector

_TENSOR = "$tensor"


class SavedOptimizer(torch.optim.Optimizer):
    """Adds an entry of its own to what PyTorch saves of an optimizer.

    Hooks see the entry: those on saving when it is there, those on loading before it is read. It stands beside
    ``state`` and ``param_groups``, and once more, with the same tensors, in the state of the first parameter, because
    tools such as ``torch.distributed.checkpoint`` keep nothing else. There it is a tuple of a text and of tensors: they
    take dictionaries apart, and expect a fresh optimizer to have the same keys.
    """

    _key: ClassVar[str]
    """The name of the entry."""

    _parameters: ParameterVector

    def _entry(self) -> dict[str, Any]:
        """What is to be saved: tensors, numbers, strings, lists and dictionaries."""
        raise NotImplementedError

    def _load_entry(self, entry: dict[str, Any]) -> None:
        """Take up an entry; raises ValueError, and changes nothing, if it is of something else."""
        raise NotImplementedError

    def _steps(self) -> int:
        """Steps taken."""
        raise NotImplementedError

    def _mark(self) -> None:
        """Give each parameter a state, since tools take an optimizer without any for one that has yet to step."""
        self.state.clear()
        for p in self._parameters.tensors:
            self.state[p] = {"step": torch.full((1,), self._steps(), device=p.device)}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit; tensors, numbers, strings, lists and dictionaries."""
        with self._withheld("_optimizer_state_dict_post_hooks") as hooks:
            state = super().state_dict()
        self._mark()
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        states = {n: dict(self.state[p]) for n, p in zip(numbers, params, strict=True) if p in self.state}
        state["state"], state[self._key] = states, self._entry()
        next(iter(states.values()))[self._key] = _packed(state[self._key])
        for hook in hooks:
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; strategies are those given to the constructor.

        Raises:
            ValueError: the state belongs to another optimizer, or to other parameters.
        """
        state = state_dict.copy()
        with self._withheld("_optimizer_load_state_dict_pre_hooks") as hooks:
            for hook in hooks:
                changed = hook(self, state)
                state = state if changed is None else changed
            with self._withheld("_optimizer_load_state_dict_post_hooks") as hooks_after:
                self._load(state)
        for hook in hooks_after:
            hook(self)

    def _load(self, state: dict[str, Any]) -> None:
        before, device = self._entry(), self._parameters.device
        self._load_entry(tree_map_only(Tensor, lambda t: t.to(device), self._found(state)))
        try:
            super().load_state_dict({"state": {}, "param_groups": state["param_groups"]})
        except BaseException:
            self._load_entry(before)
            raise
        self._mark()

    def _found(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entry of a state; of a tool that keeps only the states of parameters, the one that is there."""
        states = [own for own in state.get("state", {}).values() if isinstance(own, dict)]
        kept = [own[self._key] for own in (state, *states) if self._key in own]
        if not kept:
            raise ValueError(
                f"this state was not saved by {type(self).__name__} (it has no entry {self._key!r}). "
                "Load it into the optimizer that saved it."
            )
        return kept[0] if isinstance(kept[0], dict) else _unpacked(kept[0])

    @contextmanager
    def _withheld(self, name: str) -> Iterator[list[Callable[..., Any]]]:
        """The hooks of a kind; PyTorch's own methods do not see them meanwhile."""
        hooks = getattr(self, name)
        setattr(self, name, type(hooks)())
        try:
            yield list(hooks.values())
        finally:
            setattr(self, name, hooks)


def _packed(entry: dict[str, Any]) -> tuple[Any, ...]:
    """An entry as a text, in which numbers stand for tensors, and these tensors."""
    tensors: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {_TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(plain(entry)), *tensors


def _unpacked(packed: Sequence[Any]) -> dict[str, Any]:
    """The inverse of :func:`_packed`."""
    text, *tensors = packed
    found: dict[str, Any] = json.loads(text, object_hook=lambda d: tensors[d[_TENSOR]] if _TENSOR in d else d)
    return found
