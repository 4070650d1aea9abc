"""What others do with a saved state: hooks, distributed checkpoints, formats without pickle."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from optim_cases import F64, X
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from imstep.optim import Hutchinson, Kronecker, LeastSquares, NewtonKrylov, Nystrom, Recycling
from imstep.optim.stepwise import StepwiseOptimizer

KINDS = {"newton_krylov": NewtonKrylov, "least_squares": LeastSquares}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh(kind: Callable[..., StepwiseOptimizer], **options: Any) -> tuple[nn.Module, StepwiseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(X.shape[1], 5), nn.Tanh(), nn.Linear(5, 2)).to(F64)
    return model, kind(model.parameters(), **options)


def run(model: nn.Module, optimizer: StepwiseOptimizer, steps: int = 3) -> list[float]:
    return [float(optimizer.step(lambda: F.mse_loss(model(X), X[:, :2].sin()))) for _ in range(steps)]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@pytest.mark.parametrize("key", KINDS)
def test_numbers_of_numpy_are_saved_as_numbers(key: str) -> None:
    """``LambdaLR(optimizer, lambda epoch: 0.5 + 0.5 * np.cos(epoch))`` writes them into groups."""
    model, optimizer = fresh(KINDS[key], lr=np.float32(0.5))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch))
    run(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert type(group["lr"]) is type(group["initial_lr"]) is float


# --- hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KINDS)
def test_hooks_on_saving(key: str) -> None:
    model, optimizer = fresh(KINDS[key])
    run(model, optimizer)
    calls = []

    def extend(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append(("after", state[key]["memory"]["steps"]))
        return {**state, "epoch": 7}

    def look(_: Any, state: dict[str, Any]) -> None:
        calls.append(("again", state["epoch"]))
        state[key]["memory"]["steps"] = 100

    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("before", o is optimizer)))
    optimizer.register_state_dict_post_hook(look)
    optimizer.register_state_dict_post_hook(extend, prepend=True)
    state = optimizer.state_dict()
    assert calls == [("before", True), ("after", 3), ("again", 7)]
    assert state["epoch"] == 7
    assert state[key]["memory"]["steps"] == 100
    optimizer.load_state_dict(state)
    run(model, optimizer, 1)
    assert optimizer.last_step.step == 100


@pytest.mark.parametrize("key", KINDS)
def test_hooks_on_loading(key: str) -> None:
    model, optimizer = fresh(KINDS[key])
    run(model, optimizer)
    saved = optimizer.state_dict()
    seen = []

    def change(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        entry = {**state[key], "memory": {**state[key]["memory"], "steps": 50}}
        return {**state, key: entry}

    _, other = fresh(KINDS[key])
    other.register_load_state_dict_pre_hook(change)
    other.register_load_state_dict_pre_hook(lambda o, state: seen.append(state[key]["memory"]["steps"]))
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.cost))
    other.load_state_dict(saved)
    assert seen == [50, optimizer.cost]
    assert saved[key]["memory"]["steps"] == 3
    assert other.state_dict()[key]["memory"]["steps"] == 50


def test_hook_that_brings_the_entry() -> None:
    model, optimizer = fresh(NewtonKrylov)
    run(model, optimizer)
    entry = optimizer.state_dict()["newton_krylov"]
    _, other = fresh(NewtonKrylov)
    bare = torch.optim.SGD(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="not saved by"):
        other.load_state_dict(bare)
    handle = other.register_load_state_dict_pre_hook(lambda o, state: state.update(newton_krylov=entry))
    other.load_state_dict({"state": {}, "param_groups": other.state_dict()["param_groups"]})
    assert other.cost == optimizer.cost
    handle.remove()
    assert not other._optimizer_load_state_dict_pre_hooks


def test_failing_hook_leaves_the_others_in_place() -> None:
    _, optimizer = fresh(NewtonKrylov)
    state = optimizer.state_dict()

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    optimizer.register_state_dict_post_hook(fail)
    optimizer.register_load_state_dict_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            optimizer.state_dict()
        with pytest.raises(KeyError, match="mine"):
            optimizer.load_state_dict(state)


# --- distributed checkpoints --------------------------------------------------------------------------------------

Way = Callable[[nn.Module, StepwiseOptimizer, nn.Module, StepwiseOptimizer, Path], None]


def by_options(**options: bool) -> Way:
    chosen = StateDictOptions(**options)

    def way(model: nn.Module, optimizer: Any, other_model: nn.Module, other: Any, folder: Path) -> None:
        state = get_optimizer_state_dict(model, optimizer, options=chosen)
        set_optimizer_state_dict(other_model, other, state, options=chosen)

    return way


def through_files(model: nn.Module, optimizer: Any, other_model: nn.Module, other: Any, folder: Path) -> None:
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    state = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other_model, other, state["optimizer"])


def together(model: nn.Module, optimizer: Any, other_model: nn.Module, other: Any, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    set_state_dict(other_model, other, model_state_dict=of_model, optim_state_dict=of_optimizer)


WAYS: dict[str, Way] = {
    "plain": by_options(),
    "on the CPU": by_options(cpu_offload=True),
    "full": by_options(full_state_dict=True, cpu_offload=True),
    "files": through_files,
    "together": together,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", KINDS)
def test_distributed_checkpoints_keep_everything(key: str, way: str, tmp_path: Path) -> None:
    model, optimizer = fresh(KINDS[key])
    run(model, optimizer)
    other_model, other = fresh(KINDS[key])
    WAYS[way](model, optimizer, other_model, other, tmp_path / "checkpoint")
    other_model.load_state_dict(model.state_dict())
    assert other.cost == optimizer.cost
    assert run(other_model, other) == run(model, optimizer)


# --- other dtypes, other formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "loaded"), [(F64, torch.float32), (torch.float32, F64), (F64, torch.complex128)])
def test_other_dtypes_are_refused(saved: torch.dtype, loaded: torch.dtype) -> None:
    optimizer, other = (NewtonKrylov([nn.Parameter(torch.ones(2, dtype=dtype))]) for dtype in (saved, loaded))
    before = repr(other.state_dict())
    with pytest.raises(ValueError, match=rf"was {saved} and is {loaded}.*Convert the model"):
        other.load_state_dict(optimizer.state_dict())
    assert repr(other.state_dict()) == before


def test_states_without_dtypes_are_read() -> None:
    model, optimizer = fresh(NewtonKrylov)
    run(model, optimizer)
    state = optimizer.state_dict()
    del state["newton_krylov"]["dtypes"]
    other = NewtonKrylov(model.parameters())
    other.load_state_dict({"state": {}, "param_groups": state["param_groups"], "newton_krylov": state["newton_krylov"]})
    assert other.cost == optimizer.cost


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": True},
    {"preconditioning": Kronecker()},
    {"preconditioning": Recycling(Nystrom(3, every=1))},
    {"preconditioning": Hutchinson()},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_safetensors_without_a_copy(options: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = fresh(NewtonKrylov, **options)
    run(model, optimizer)
    state = optimizer.state_dict()
    places = [t.data_ptr() for t in tensors(state["newton_krylov"])]
    assert len(set(places)) == len(places) > 0
    text, *parts = state["param_groups"][0]["newton_krylov"]
    assert [t.data_ptr() for t in parts] == places
    assert [t.data_ptr() for t in tensors(optimizer.state_dict()["newton_krylov"]) if t.is_floating_point()] == [
        t.data_ptr() for t in parts if t.is_floating_point()
    ]
    save_file({str(n): t for n, t in enumerate([text, *parts])}, tmp_path / "optimizer")
    other_model, other = fresh(NewtonKrylov, **options)
    found = load_file(tmp_path / "optimizer")
    entry = tuple(found[str(n)] for n in range(len(found)))
    other.load_state_dict({"param_groups": other.state_dict()["param_groups"], "newton_krylov": entry})
    other_model.load_state_dict(model.state_dict())
    assert run(other_model, other) == run(model, optimizer)


def test_saved_tensors_have_memory_of_their_own() -> None:
    """Weights in another order of memory, whose squared gradients are laid out likewise."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    optimizer = NewtonKrylov(model.parameters(), preconditioning=Kronecker(largest=4))
    for _ in range(2):
        optimizer.step(lambda: model(x).pow(2).mean())
    for t in tensors(optimizer.state_dict()["newton_krylov"]):
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
