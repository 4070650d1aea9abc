"""Between parameters and flat vectors: round trips, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from imstep.curvature import ParameterVector

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=5)


def parameters_of(description: list[tuple[list[int], torch.dtype, bool]]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape).to(dtype), trainable) for shape, dtype, trainable in description]
    return [*made, nn.Parameter(torch.randn(2))]


@given(tensors, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_round_trip(description: list[tuple[list[int], torch.dtype, bool]], seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        params = parameters_of(description)
        vector = ParameterVector(params)
        trainable = [p for p in params if p.requires_grad]
        assert vector.size == sum(p.numel() for p in trainable)
        flat = vector.get()
        assert flat.shape == (vector.size,)
        assert flat.dtype is (torch.float64 if torch.float64 in {p.dtype for p in trainable} else torch.float32)
        for part, p in zip(vector.unflatten(flat), trainable, strict=True):
            assert part.dtype is p.dtype
            assert torch.equal(part, p)
        direction = torch.randn(vector.size).to(flat.dtype)
        halves = [part.to(torch.float64) for part in vector.unflatten(direction)]
        expected = torch.cat([h.reshape(-1) for h in halves])
        torch.testing.assert_close(vector.flatten(vector.unflatten(direction)).double(), expected, rtol=0, atol=0)


@given(tensors)
@settings(max_examples=30, deadline=None)
def test_snapshot_restores_bit_for_bit(description: list[tuple[list[int], torch.dtype, bool]]) -> None:
    params = parameters_of(description)
    vector = ParameterVector(params)
    before = [p.detach().clone() for p in params]
    snapshot = vector.snapshot()
    vector.move(snapshot, torch.ones(vector.size, dtype=vector.dtype), 0.25)
    for p, old in zip(params, before, strict=True):
        moved = old + torch.tensor(0.25).to(p.dtype) if p.requires_grad else old
        assert torch.equal(p, moved)
    vector.restore(snapshot)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_order_is_that_of_the_module() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([5.0, 6.0]))
    assert ParameterVector(layer).get().tolist() == [1, 2, 3, 4, 5, 6]


def test_missing_parts_are_zero() -> None:
    vector = ParameterVector([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))])
    assert vector.flatten([None, torch.tensor([3.0])]).tolist() == [0, 0, 3]


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    params = [*first.parameters(), *second.parameters()]
    assert ParameterVector(params).size == 8
    assert ParameterVector(nn.ModuleList([first, second])).size == 8


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert ParameterVector(model).size == 4


def refused(params: object, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as raised:
        ParameterVector(params)  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in words)


def test_no_parameters() -> None:
    refused([], ValueError, "none was given")
    refused(nn.ReLU(), ValueError, "none was given")


def test_all_frozen() -> None:
    refused(nn.Linear(2, 1).requires_grad_(False), ValueError, "all 2", "requires_grad=False")


def test_integer_parameters_cannot_require_gradients() -> None:
    refused([nn.Parameter(torch.tensor([1, 2]), requires_grad=False)], ValueError, "requires_grad=False")


def test_several_devices() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    refused(params, ValueError, "several devices", "cpu", "meta")


def test_sparse_layout() -> None:
    sparse = torch.eye(3).to_sparse().requires_grad_()
    refused([sparse], TypeError, "layout", "torch.sparse_coo")


def test_not_tensors() -> None:
    refused(nn.Linear(2, 1).named_parameters(), TypeError, "tuple", "model.parameters()")
    refused(["w"], TypeError, "str")


def test_one_tensor() -> None:
    refused(torch.zeros(3, requires_grad=True), TypeError, "[tensor]")


def test_unflatten_shows_the_vector() -> None:
    vector = ParameterVector(nn.Linear(2, 2))
    flat = torch.zeros(6)
    parts: list[Tensor] = vector.unflatten(flat)
    parts[1].fill_(1.0)
    assert flat.tolist() == [0, 0, 0, 0, 1, 1]


def shared(first: Tensor, second: Tensor, *words: str) -> None:
    refused([nn.Parameter(first), nn.Parameter(second)], ValueError, "share memory", "clone()", *words)


def test_memory_that_is_shared() -> None:
    flat, square = torch.randn(9), torch.randn(3, 3)
    shared(square, square, "parameters 0 and 1", "decoder.weight = encoder.weight")
    shared(square, square.T)
    shared(flat[:4], flat[2:])
    shared(flat[2:], flat[:4])
    shared(flat[::2], flat[::4])
    shared(flat, flat.view(torch.int32).view(torch.float32)[3:4])
    shared(torch.view_as_complex(flat[:8].view(4, 2)), flat[7:])
    shared(torch.from_numpy(flat.numpy()), torch.from_numpy(flat.numpy()))


def test_memory_that_is_shared_by_frozen_parameters() -> None:
    w = torch.randn(3)
    refused([nn.Parameter(w), nn.Parameter(w[1:], requires_grad=False)], ValueError, "share memory", "frozen")
    assert ParameterVector([nn.Parameter(w[:1]), *(nn.Parameter(w[1:], requires_grad=False) for _ in "ab")]).size == 1


def test_names_of_parameters_that_share_memory() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.data)
    refused(model, ValueError, "parameters 0.weight and 1.weight")


def test_parts_of_one_memory_that_do_not_meet() -> None:
    flat, square = torch.randn(9), torch.randn(3, 4)
    for parts in (flat.split(4), square.unbind(1), [flat[::3], flat[1::3], flat[5:5]], [square[:, :2], square[:, 2:]]):
        assert ParameterVector(map(nn.Parameter, parts)).size == sum(part.numel() for part in parts)


def test_entries_at_one_place() -> None:
    for folded in (torch.randn(1).expand(3), torch.randn(5).unfold(0, 3, 1), torch.randn(2, 1, 2).expand(2, 3, 2)):
        refused([nn.Parameter(folded)], ValueError, "several entries at one place")
    for apart in (torch.randn(1).expand(1), torch.randn(11).as_strided((3, 3), (2, 3)), torch.randn(0, 1).expand(0, 3)):
        assert ParameterVector([nn.Parameter(apart)]).size == apart.numel()


def test_tensors_without_memory() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 has no memory yet .* Call model.to_empty"):
        ParameterVector([nn.Parameter(torch.zeros(2, device="meta")) for _ in "ab"][:1])
    with FakeTensorMode():
        assert ParameterVector([nn.Parameter(torch.zeros(2)) for _ in "ab"]).size == 4
