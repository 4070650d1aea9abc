"""Whole weights of sharded models, gathered unit by unit: the same steps, with memory that falls with processes."""

from __future__ import annotations

import os
from statistics import mean
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shared_cases import X, Y, mlp, parts, squares, succeeded
from test_sharded import Odd, close, end, odd, over, two_layers, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import profile

from imstep import Hessian, NewtonKrylov
from imstep.curvature import units
from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.linalg import NoiseTest
from imstep.optim import ConjugateGradient, ExactHessian, ExponentialAverage, NoPreconditioning
from tests.launching import launch

WHOLE = X, Y
LAYERS, WIDTH = 12, 40
UNIT = 8 * WIDTH * (WIDTH + 1)
"""Bytes of the weights of a layer, which is a unit."""

DECAYED: dict[str, Any] = {"weight_decay": 0.01, "average": ExponentialAverage(), "momentum": True}
HALVED: dict[str, Any] = {"solver": ConjugateGradient(noise=NoiseTest()), "curvature": ExactHessian()}
PLAIN: dict[str, Any] = {"weight_decay": 0.1, "preconditioning": NoPreconditioning()}

ONE = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))).double()


def loss(model: nn.Module) -> Tensor:
    return (model(ONE) - 0.5).square().mean()


def memory(rank: int) -> tuple[float, float]:
    """The most that a product has allocated at a time, its result included, and what the record keeps; in units.

    The least of several products: how long an exchange holds its buffers differs, and they only add to it.
    """
    units.TOGETHER = 0
    model: Any = deep()
    for layer in model[::2]:
        fully_shard(layer)
    fully_shard(model)
    H = Hessian.over([ONE], lambda batch: loss(model), model, process_group=dist.group.WORLD)
    v = H.held(torch.ones(H.shape[1], dtype=torch.float64))
    H @ v
    peaks = []
    for _ in range(8):
        with profile(profile_memory=True) as found:
            H @ v
        now = most = 0
        for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
            now += event.nbytes() if event.name() == "[memory]" else 0
            most = max(most, now)
        peaks.append(most)
    return min(peaks) / UNIT, H.nbytes / UNIT


def steps(rank: int) -> Any:
    """Of all kinds of parameters, with a penalty, with a noise test, in pieces, and without data in one process."""
    units.TOGETHER = 0
    one, two, three, four = odd(), two_layers(), two_layers(), two_layers()
    own = parts(WHOLE)[rank]
    pieces = [tuple(t[:2] for t in own), tuple(t[2:] for t in own)]
    return [
        end(one, over(one, **DECAYED), [own]),
        end(two, over(two, **HALVED), [own]),
        end(three, over(three, **PLAIN), pieces),
        end(four, over(four), [WHOLE] if rank else []),
    ]


def read_past_operators(rank: int) -> Any:
    """A closure that looks at numbers on other ways than by operators of PyTorch."""
    units.TOGETHER = 0
    model, seen = two_layers(), []

    def closure() -> Tensor:
        value = squares(model, WHOLE)
        weight = model[0].weight.detach()
        seen.append((weight.numpy()[0, 0].item(), weight[0].tolist()[0], float(weight[0, 0])))
        return value

    first = whole(model.parameters())[0]
    over(model).step(closure)
    return [*seen[0], first]


def faults(rank: int) -> Any:
    """A failure amid an evaluation in one process, and a closure that writes to parameters; then a step."""
    units.TOGETHER = 0
    model, raised = two_layers(), []
    before = whole(model.parameters())

    def fails() -> Tensor:
        value = squares(model, WHOLE)
        if rank:
            raise ZeroDivisionError
        return value

    def writes() -> Tensor:
        with torch.no_grad():
            model[0].weight.mul_(2)
        return squares(model, WHOLE)

    for closure in (fails, writes):
        try:
            over(model).step(closure)
        except (ZeroDivisionError, OtherProcessError, ValueError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    same = whole(model.parameters()) == before
    return raised, same, end(model, over(model), [parts(WHOLE)[rank]])


def killed(rank: int) -> Any:
    """One process ends where the other waits for its chunks."""
    units.TOGETHER = 0
    model = two_layers()

    def closure() -> Tensor:
        value = squares(model, WHOLE)
        if rank:
            os._exit(1)
        return value

    try:
        over(model).step(closure)
    except ProcessesLostError as error:
        return str(error)
    return "nothing was raised"


@pytest.fixture(scope="module", name="two")
def launched() -> Any:
    return launch(2, steps, read_past_operators, faults, memory, killed, timeout=60)


def test_steps_are_those_of_one_process(two: Any) -> None:
    first, second = succeeded(two["steps"])
    assert first == second
    models = Odd(), mlp(), mlp(), mlp()
    for found, model, options in zip(first, models, (DECAYED, HALVED, PLAIN, {}), strict=True):
        assert close(found, end(model, NewtonKrylov(model.parameters(), **options), [WHOLE]))


def test_numbers_are_there_for_whatever_looks_at_them(two: Any) -> None:
    for seen in succeeded(two["read_past_operators"]):
        assert len(set(seen)) == 1


def test_a_fault_leaves_the_model_as_it_was(two: Any) -> None:
    of_ranks = succeeded(two["faults"])
    assert [raised[0].split(":")[0] for raised, *_ in of_ranks] == ["OtherProcessError", "ZeroDivisionError"]
    for raised, same, after in of_ranks:
        assert "closure changed the parameters" in raised[1]
        assert same
        model = mlp()
        assert close(after, end(model, NewtonKrylov(model.parameters()), [WHOLE]))


def test_a_process_that_ends_is_told_of(two: Any) -> None:
    assert "one has ended" in two["killed"][0]


def test_memory_falls_with_the_number_of_processes(two: Any) -> None:
    plain = deep()
    recorded = Hessian(lambda: loss(plain), plain).nbytes / UNIT
    of_two, of_four = succeeded(two["memory"]), succeeded(launch(4, memory)["memory"])
    assert all(kept < recorded - 0.8 * LAYERS for _, kept in (*of_two, *of_four))  # no weights
    peaks = [mean(peak for peak, _ in found) for found in (of_two, of_four)]
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[1] < 1.5 * LAYERS  # of which each process once had three and more
