"""Nested states survive the trip through JSON and safetensors exactly."""

import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imstep.runs.codec import CodecError, flatten, unflatten


def through_files(state: Any) -> Any:
    structure, tensors = flatten(state)
    return unflatten(
        json.loads(json.dumps(structure, allow_nan=False)),
        safetensors.torch.load(safetensors.torch.save(tensors)),
    )


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, float):
        return a.hex() == b.hex() or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


TENSORS = st.sampled_from(
    [
        torch.tensor(1 / 3),
        torch.tensor([math.inf, math.nan, -0.0]),
        torch.zeros(0, 3, dtype=torch.float64),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8)[1:3],
        torch.ones(2, dtype=torch.bfloat16),
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
STATES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(STATES)
def test_round_trip_is_exact(state: Any) -> None:
    assert same(through_files(state), state)


@pytest.mark.parametrize(
    "state",
    [
        {"$tensor": 1.0},
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"": {"": torch.ones(1)}},
        {"radius": math.inf, "dtype": torch.float64},
    ],
)
def test_awkward_keys_do_not_collide(state: Any) -> None:
    assert same(through_files(state), state)


def test_shared_memory_is_copied() -> None:
    base = torch.arange(4.0)
    state = {"all": base, "part": base[1:], "again": base}
    loaded = through_files(state)
    base.zero_()
    assert loaded["part"].tolist() == [1, 2, 3]


def test_what_needs_a_pickle_is_refused_with_its_place() -> None:
    with pytest.raises(CodecError, match=r"holds a function at root\.state\.0"):
        flatten({"state": [lambda: None]})
