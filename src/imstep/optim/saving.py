"""Optimizers that save more than a state per parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from imstep.curvature.parameters import ParameterVector

_TENSOR = "$tensor"


class SavedOptimizer(torch.optim.Optimizer):
    """Adds an entry of its own to what PyTorch saves of an optimizer.

    Hooks see the entry: those on saving when it is there, those on loading before it is read. It stands beside
    ``state`` and ``param_groups``, and once more, with the same tensors, in the first group, because tools such as
    ``torch.distributed.checkpoint`` keep nothing else. There it is a tuple of tensors: they take dictionaries apart,
    and expect a fresh optimizer to have the same keys.
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

    def _mark(self) -> None:
        """Have a state, since tools take an optimizer without any for one that has to step first."""
        self.state[self._parameters.tensors[0]] = {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit; tensors, numbers, strings, lists and dictionaries."""
        with self._withheld("_optimizer_state_dict_post_hooks") as hooks:
            state = super().state_dict()
        # Schedules by NumPy's functions leave its numbers, which torch.load() does not take without being told.
        state["param_groups"] = tree_map_only(np.generic, lambda number: number.item(), state["param_groups"])
        state["state"], state[self._key] = {}, self._entry()
        state["param_groups"][0][self._key] = _packed(state[self._key], self._parameters.device)
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
        # A state of an earlier version lacks options that there are now.
        groups = [{**self.defaults, **group} for group in state["param_groups"]]
        groups = [{k: v for k, v in group.items() if k != self._key} for group in groups]
        try:
            super().load_state_dict({"state": {}, "param_groups": groups})
        except BaseException:
            self._load_entry(before)
            raise
        self._mark()

    def _found(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entry of a state; of a tool that keeps only groups, the one that is there."""
        kept = [own[self._key] for own in (state, *state["param_groups"]) if self._key in own]
        if not kept:
            raise ValueError(
                f"this state was not saved by {type(self).__name__} (it has no entry {self._key!r}). "
                "Load it into the optimizer that saved it; a distributed checkpoint must be made and loaded without "
                "flatten_optimizer_state_dict, which takes the entry apart."
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


def _packed(entry: dict[str, Any], device: torch.device) -> tuple[Tensor, ...]:
    """An entry as the bytes of a text, in which numbers stand for tensors, and these tensors, all on one device."""
    tensors: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.to(device))
            return {_TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps(plain(entry)).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device=device), *tensors


def _unpacked(packed: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of :func:`_packed`."""
    text, *tensors = packed
    put_back = lambda d: tensors[d[_TENSOR]] if _TENSOR in d else d
    found: dict[str, Any] = json.loads(bytes(text.tolist()), object_hook=put_back)
    return found


def saved_forms(parameters: ParameterVector) -> dict[str, Any]:
    """What an entry says of the parameters that it belongs to."""
    tensors = parameters.tensors
    return {"shapes": [list(p.shape) for p in tensors], "dtypes": [str(p.dtype) for p in tensors]}


def check_saved_forms(entry: dict[str, Any], parameters: ParameterVector) -> None:
    """Raise where an entry belongs to parameters of other shapes or dtypes."""
    shapes, dtypes = saved_forms(parameters).values()
    if entry.get("shapes") != shapes:
        raise ValueError(
            f"this state belongs to parameters of shapes {entry.get('shapes')}, the optimizer has {shapes}. "
            "Load it into an optimizer of the same model, with the same parameters frozen."
        )
    saved = entry.get("dtypes", dtypes)
    if saved != dtypes:
        at = next(i for i, kinds in enumerate(zip(saved, dtypes, strict=True)) if kinds[0] != kinds[1])
        raise ValueError(
            f"this state belongs to parameters of other dtypes: number {at} was {saved[at]} and is {dtypes[at]}. "
            "Convert the model to what it was, for instance with model.double(), before the optimizer is built, or "
            "begin with a fresh optimizer."
        )
