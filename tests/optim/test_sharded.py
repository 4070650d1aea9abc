"""Parameters under fully_shard: the step of one process on the whole batch, on vectors that each holds a part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shared_cases import Batch, X, Y, flat, mlp, parts, squares, succeeded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from imstep.curvature import Hessian
from imstep.curvature.processes import OtherProcessError
from imstep.linalg import NoiseTest
from imstep.linalg.sharded import ShardedTensor
from imstep.optim import (
    ConjugateGradient,
    Direct,
    ExactHessian,
    ExponentialAverage,
    GeneralizedLanczos,
    Hutchinson,
    LeastSquares,
    MicroBatches,
    NewtonKrylov,
)
from tests.launching import launch, outcomes

WHOLE = (X, Y)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decayed": {"weight_decay": 0.01, "average": ExponentialAverage(), "momentum": True, "variance_every": 1},
    "halved": {"solver": ConjugateGradient(noise=NoiseTest(), warm_start=0.5), "curvature": ExactHessian()},
    "other": {"solver": GeneralizedLanczos(), "preconditioning": Hutchinson()},
}


class Odd(nn.Module):
    """Frozen and tied weights, a scalar, a layer twice, recomputation, and parameters that are cut in other ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen, self.tied, self.again = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.again.weight = self.tied.weight
        self.out, self.scale = nn.Linear(5, 2), nn.Parameter(torch.tensor(1.3))
        self.block = nn.Parameter(torch.randn(3, 4, 2))
        self.frozen.requires_grad_(False)
        self.double()

    def layers(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(torch.tanh(self.tied(x))))

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = checkpoint(self.layers, self.frozen(x), use_reentrant=False)
        return self.scale * self.out(inner) + 0.1 * (self.block**2).sum()


def sharded(model: Any, *inner: Any, **options: Any) -> Any:
    for part in inner:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def odd() -> Any:
    model = Odd()
    cut = {"ignored_params": {model.scale, model.out.bias}, "shard_placement_fn": lambda p: Shard(int(p.ndim == 3))}
    return sharded(model, model.frozen, [model.tied, model.again], **cut)


def two_layers() -> Any:
    model = mlp()
    return sharded(model, model[0])


def whole(tensors: Any) -> list[float]:
    """All entries, in every process."""
    parts_ = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().reshape(-1) for t in parts_]).tolist()


def over(model: nn.Module, **options: Any) -> NewtonKrylov:
    return NewtonKrylov(model.parameters(), process_group=dist.group.WORLD, **options)


def train(model: nn.Module, optimizer: NewtonKrylov, batches: list[Batch], steps: int = 2) -> list[float]:
    alone = optimizer._processes is None
    closure: Any = lambda: squares(model, batches[0])
    pieces = MicroBatches(lambda batch: squares(model, batch), batches)
    return [float(optimizer.step(closure if alone else pieces)) for _ in range(steps)]


def end(model: Any, optimizer: NewtonKrylov, batches: list[Batch]) -> list[list[float]]:
    """What training leads to: losses, parameters, gradient; and what the model computes afterwards, and averaged."""
    losses = train(model, optimizer, batches)
    found = [losses, whole(model.parameters()), whole(p.grad for p in model.parameters() if p.requires_grad)]
    with torch.no_grad():
        seen = [float(squares(model, WHOLE))]
        if optimizer._average is not None:
            with optimizer.averaged():
                seen.append(float(squares(model, WHOLE)))
            seen.append(float(squares(model, WHOLE)))
    return [*found, seen]


# --- in two processes -----------------------------------------------------------------------------------------------


def strategies(rank: int) -> Any:
    found = {}
    for name, options in OPTIONS.items():
        model = two_layers()
        found[name] = end(model, over(model, **options), [parts(WHOLE)[rank]])
    return found


def mixed(rank: int) -> Any:
    model = odd()
    return end(model, over(model), [parts(WHOLE)[rank]])


def without_data(rank: int) -> Any:
    model = two_layers()
    return end(model, over(model), [WHOLE] if rank else [])


def own_backward(rank: int) -> Any:
    model = two_layers()
    optimizer, half = over(model), slice(6 * rank, 6 * rank + 6)
    squares(model, WHOLE).backward()

    def closure() -> Tensor:
        optimizer.zero_grad()
        (7 * squares(model, WHOLE)).backward()
        optimizer.zero_grad()
        loss = squares(model, (X[half], Y[half])) + sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return whole(model.parameters())


def out_of_a_saddle(rank: int) -> Any:
    model = sharded(bowl())
    optimizer = over(model, curvature=ExactHessian())
    optimizer.step(lambda: valley(model))
    return whole(model.parameters())


def bowl() -> nn.Module:
    layer = nn.Linear(9, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    return layer


def valley(model: nn.Module) -> Tensor:
    z = model(X.repeat(1, 3)[:, :9])
    return (z**4 - z**2).sum()


def saving(rank: int) -> Any:
    options = {"average": ExponentialAverage(), "momentum": True}
    model, other = two_layers(), two_layers()
    optimizer, again = over(model, **options), over(other, **options)
    train(model, optimizer, [parts(WHOLE)[rank]])
    state = optimizer.state_dict()
    weights = {name: p.full_tensor().tolist() for name, p in model.state_dict().items()}
    other.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    ends = []
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, [parts(WHOLE)[rank]], 1)
        ends.append(whole(m.parameters()))
    kept = kept_vectors(again)
    state = {name: value for name, value in state.items() if name != "param_groups"}
    plain = torch.utils._pytree.tree_map_only(Tensor, lambda t: (t.tolist(), str(t.dtype)), state)
    return {
        "ends": ends,
        "state": plain,
        "weights": weights,
        "lengths": [v.own.numel() for v in kept if isinstance(v, ShardedTensor)],
        "others": [tuple(v.shape) for v in kept if not isinstance(v, ShardedTensor)],
        "shards": sum(p.to_local().numel() for p in model.parameters()),
    }


def kept_vectors(optimizer: Any) -> list[Tensor]:
    """All vectors over the parameters that a step leaves to the next."""
    memory = [v for v in vars(optimizer._memory).values() if isinstance(v, Tensor)]
    pairs = [v for pair in optimizer._preconditioner._pairs for v in pair]
    return [*memory, *pairs, optimizer._average._value]


def failing(rank: int) -> Any:
    model = two_layers()
    optimizer = over(model)
    train(model, optimizer, [WHOLE], 1)
    before = whole(model.parameters())

    def closure() -> Tensor:
        if rank:
            raise ZeroDivisionError
        return squares(model, WHOLE)

    try:
        optimizer.step(closure)
        raised = "nothing"
    except (ZeroDivisionError, OtherProcessError) as error:
        raised = type(error).__name__
    same = whole(model.parameters()) == before
    with torch.no_grad():
        evaluated = float(squares(model, WHOLE))
    return raised, same, evaluated - train(model, optimizer, [WHOLE], 1)[0]


def _lower_precision(model: Any) -> Any:
    return over(fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))


def _tensor_parallel(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    return over(model)


def _held_from_outside(model: Any) -> Any:
    held = list(fully_shard(model).parameters())
    over(model).step(lambda: squares(model, WHOLE) + sum(p.square().sum() for p in held))


def _held_locally(model: Any) -> Any:
    held = list(fully_shard(model).parameters())
    over(model).step(lambda: squares(model, WHOLE) + sum(p.to_local().square().sum() for p in held))


def _gathered_before(model: Any) -> Any:
    with torch.no_grad():
        fully_shard(model)(X)
    over(model).step(lambda: squares(model, WHOLE))


def _accumulated(model: Any) -> Any:
    optimizer = over(fully_shard(model))
    squares(model, WHOLE).backward()

    def closure() -> None:
        squares(model, WHOLE).backward()

    optimizer.step(closure)


def _of_another(model: Any) -> Any:
    other, _ = fully_shard(mlp()), fully_shard(model)
    over(model).step(lambda: squares(model, (X, other(X).detach())))


def _replaced(model: Any) -> Any:
    optimizer = over(fully_shard(model))
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    model.load_state_dict(copies, assign=True)
    optimizer.step(lambda: squares(model, WHOLE))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor parallelism": (_tensor_parallel, "tensor parallelism are not supported. Shard the model by fully_shard"),
    "copies": (
        lambda model: over(fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))),
        "(hybrid sharding), which is not supported. Call fully_shard(model, mesh=",
    ),
    "lower precision": (_lower_precision, "Leave mp_policy out, and evaluate the model in"),
    "offloading": (
        lambda model: over(fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "Leave offload_policy out",
    ),
    "no memory": (lambda model: over(fully_shard(model.to("meta"))), "Call model.to_empty(device=...)"),
    "held": (_held_from_outside, "take them from the model inside the closure"),
    "held locally": (_held_locally, "take them from the model inside the closure"),
    "gathered": (_gathered_before, "call model.reshard() first"),
    "accumulated": (_accumulated, "calls backward() without zero_grad()"),
    "another model": (_of_another, "of which no parameter belongs to the optimizer. Evaluate it outside"),
    "replaced": (_replaced, "Build the optimizer anew"),
    "no group": (
        lambda model: NewtonKrylov(fully_shard(model).parameters()).step(lambda: squares(model, WHOLE)),
        "NewtonKrylov(model.parameters(), process_group=",
    ),
    "least squares": (
        lambda model: LeastSquares(fully_shard(model).parameters(), process_group=dist.group.WORLD),
        "LeastSquares works on whole parameters in every process",
    ),
    "operator": (
        lambda model: Hessian(lambda: squares(model, WHOLE), fully_shard(model)),
        "load the weights into a model that is not sharded",
    ),
    "whole matrix": (
        lambda model: train(model, over(fully_shard(model), solver=Direct()), [WHOLE], 1),
        "Take the default solver, preconditioning and step search",
    ),
}


def refusals(rank: int) -> Any:
    found = {}
    for name, (attempt, _) in REFUSED.items():
        try:
            attempt(mlp())
        except (ValueError, NotImplementedError) as error:
            found[name] = str(error)
    return found


CHECKS = (strategies, mixed, without_data, own_backward, out_of_a_saddle, saving, failing, refusals)
two = outcomes(2, CHECKS)


# --- compared with one ----------------------------------------------------------------------------------------------


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0, atol=tolerance) for a, b in pairs)


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_one_process(two: Any, name: str) -> None:
    first, second = (of_rank[name] for of_rank in succeeded(two["strategies"]))
    model = mlp()
    assert first == second
    assert close(first, end(model, NewtonKrylov(model.parameters(), **OPTIONS[name]), [WHOLE]))


@pytest.mark.parametrize(("check", "make"), [("mixed", Odd), ("without_data", mlp)])
def test_whatever_is_sharded_how(two: Any, check: str, make: Any) -> None:
    first, second = succeeded(two[check])
    model = make()
    assert first == second
    assert close(first, end(model, NewtonKrylov(model.parameters()), [WHOLE]))


def test_a_closure_may_call_backward_and_use_parameters_of_the_model(two: Any) -> None:
    model = mlp()
    loss = lambda: squares(model, WHOLE) + sum(p.square().sum() for p in model.parameters())
    NewtonKrylov(model.parameters()).step(loss)
    for found in succeeded(two["own_backward"]):
        assert close([found], [flat(model).tolist()])


def test_a_saddle_is_left(two: Any) -> None:
    model = bowl()
    NewtonKrylov(model.parameters(), curvature=ExactHessian()).step(lambda: valley(model))
    assert flat(model).abs().max() > 0.01
    for found in succeeded(two["out_of_a_saddle"]):
        assert close([found], [flat(model).tolist()])


def test_what_lasts_is_sharded(two: Any) -> None:
    found = succeeded(two["saving"])
    for of_rank in found:
        assert len(of_rank["lengths"]) >= 5
        assert set(of_rank["lengths"]) == {of_rank["shards"]}
        assert of_rank["others"] == []
    assert sum(of_rank["shards"] for of_rank in found) == flat(mlp()).numel()


def test_a_state_is_continued_by_two_processes_and_by_one(two: Any) -> None:
    first, second = succeeded(two["saving"])
    assert first["ends"][0] == first["ends"][1] == second["ends"][0]
    model = mlp()
    model.load_state_dict({name: torch.tensor(p, dtype=torch.float64) for name, p in first["weights"].items()})
    optimizer = NewtonKrylov(model.parameters(), average=ExponentialAverage(), momentum=True)
    state = _with_tensors(first["state"])
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    train(model, optimizer, [WHOLE], 1)
    assert close([first["ends"][0]], [flat(model).tolist()])


def _with_tensors(state: Any) -> Any:
    if isinstance(state, tuple):
        return torch.tensor(state[0], dtype=getattr(torch, state[1].removeprefix("torch.")))
    if isinstance(state, dict):
        return {name: _with_tensors(value) for name, value in state.items()}
    return [_with_tensors(value) for value in state] if isinstance(state, list) else state


def test_a_failure_in_one_process_leaves_the_model_as_it_was(two: Any) -> None:
    raised, same, difference = zip(*succeeded(two["failing"]), strict=True)
    assert raised == ("OtherProcessError", "ZeroDivisionError")
    assert all(same)
    assert max(map(abs, difference)) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_says_what_to_do(two: Any, name: str) -> None:
    for of_rank in succeeded(two["refusals"]):
        assert REFUSED[name][1] in of_rank.get(name, "nothing was raised")


def four_processes(rank: int) -> Any:
    model = odd()
    return end(model, over(model), [parts(WHOLE, 4)[rank]])


def test_four_processes_of_which_some_have_nothing_of_a_parameter() -> None:
    found = succeeded(launch(4, four_processes)["four_processes"])
    model = Odd()
    expected = end(model, NewtonKrylov(model.parameters()), [WHOLE])
    for of_rank in found:
        assert of_rank == found[0]
    assert close(found[0], expected)
