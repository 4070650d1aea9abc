"""Nested optimizer state as flat tensors plus JSON, and back without loss.

safetensors holds a flat dict of tensors; JSON holds the rest. Every tensor of a nested state is taken
out and replaced by `{"$tensor": key}`; what JSON would change (tuples, integer keys, infinities,
types) is written with a tag. Finite floats need none: Python writes the shortest decimal that
reads back as the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["CodecError", "flatten", "unflatten"]


class CodecError(TypeError):
    """A state holds something that is neither tensor, number, string, list, tuple, dict nor None."""


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a nested state into JSON-able structure and tensors.

    Args:
        state: tensors, bools, ints, floats, strings, None, and lists, tuples and dicts of these.

    Returns:
        (structure, tensors); the tensors lie on the CPU, each in memory of its own. Those that do already are not
        copied, and one that occurs several times is there once.

    Raises:
        CodecError: anything else; the message says where it sits.

    >>> flatten({"t": 1.0, 3: (None, torch.ones(2))})[0]
    {'$dict': [['t', 1.0], [3, {'$tuple': [None, {'$tensor': 'root.3.1'}]}]]}
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(state, "root", tensors, {}), tensors


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor], keys: dict[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        if id(value) not in keys:
            keys[id(value)] = key = path if path not in tensors else f"{path}#{len(tensors)}"
            tensors[key] = _alone(value.detach().cpu(), tensors.values())
        return {"$tensor": keys[id(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{i}", tensors, keys) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(key, _encode(item, f"{path}.{key}", tensors, keys)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[_encode(key, f"{path}.key", tensors, keys), item] for key, item in pairs]}
    raise CodecError(
        f"the state holds a {type(value).__name__} at {path}, which JSON cannot carry without a pickle. "
        "Keep tensors, numbers, strings, lists, tuples, dicts and None in state_dict()."
    )


def _alone(t: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """``t`` in memory that shows nothing else."""
    whole = t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    shared = any(t.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)
    return t.clone(memory_format=torch.contiguous_format) if shared or not whole else t


def unflatten(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that `flatten` split; tensors on the CPU.

    Raises:
        KeyError: a tensor that the structure names is missing.
        ValueError: a tag that `flatten` does not write.
    """
    if isinstance(structure, list):
        return [unflatten(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    tag = next(iter(structure), "")
    if not tag.startswith("$"):
        return {key: unflatten(item, tensors) for key, item in structure.items()}
    return _decode(tag, structure[tag], tensors)


def _decode(tag: str, content: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if tag == "$tensor":
        return tensors[content]
    if tag == "$float":
        return float(content)
    if tag == "$dtype":
        return getattr(torch, content)
    if tag == "$tuple":
        return tuple(unflatten(item, tensors) for item in content)
    if tag == "$dict":
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in content}
    raise ValueError(f"unknown tag {tag!r}")
