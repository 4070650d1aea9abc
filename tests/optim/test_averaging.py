"""The average of the iterates inside the optimizer: what it is, where it shows, and how it is resumed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optim_cases import LABELS, X, network
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imstep import LeastSquares, NewtonKrylov
from imstep.optim import ExponentialAverage, TailAverage

BATCHES = [(X[i::4], LABELS[i::4]) for i in range(4)]


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def step(optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> None:
    x, y = BATCHES[count % 4]
    squares = isinstance(optimizer, LeastSquares)
    optimizer.step(lambda: model(x).square().mean() if squares else F.cross_entropy(model(x), y))


def weighted(iterates: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * t for w, t in zip(weights, iterates, strict=True)) / sum(weights)


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares])
@pytest.mark.parametrize(
    ("average", "weights"),
    [
        (ExponentialAverage(0.5), [1, 1, 2, 4, 8]),
        (ExponentialAverage(0.0), [0, 0, 0, 0, 1]),
        (TailAverage(0.0), [1, 1, 1, 1, 1]),
        (TailAverage(1.0), [1, 2, 3, 4, 5]),
        (TailAverage(3.0), [6, 24, 60, 120, 210]),  # k (k + 1) (k + 2)
    ],
)
def test_the_average_is_that_of_the_iterates(make: type, average: object, weights: list[float]) -> None:
    model, iterates = network(), []
    optimizer = make(model.parameters(), average=average)
    for count in range(5):
        step(optimizer, model, count)
        iterates.append(vector(model))
    with optimizer.averaged():
        shown = vector(model)
    torch.testing.assert_close(shown, weighted(iterates, weights), rtol=1e-12, atol=1e-14)
    assert torch.equal(vector(model), iterates[-1])


def test_in_the_long_run_it_is_pytorchs() -> None:
    model = network()
    optimizer, outside = NewtonKrylov(model.parameters(), average=ExponentialAverage(0.3)), None
    outside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.3))
    for count in range(25):
        step(optimizer, model, count)
        outside.update_parameters(model)
    with optimizer.averaged():
        torch.testing.assert_close(vector(model), vector(outside.module), rtol=1e-9, atol=1e-9)


def test_it_does_not_change_the_steps() -> None:
    found = []
    for average in (None, ExponentialAverage()):
        model = network()
        optimizer = NewtonKrylov.for_batches(model.parameters(), average=average)
        for count in range(5):
            step(optimizer, model, count)
            if average is not None:
                with optimizer.averaged():
                    model(X)
        found.append(vector(model))
    assert torch.equal(*found)


def test_an_exception_leaves_the_parameters_as_they_were() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), average=TailAverage())
    for count in range(3):
        step(optimizer, model, count)
    before = vector(model)

    def fail() -> None:
        with optimizer.averaged():
            assert not torch.equal(vector(model), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(vector(model), before)
    step(optimizer, model, 3)


def test_before_the_first_step_parameters_are_shown_as_they_are() -> None:
    model = network()
    before = vector(model)
    with NewtonKrylov(model.parameters(), average=ExponentialAverage()).averaged():
        assert torch.equal(vector(model), before)


@pytest.mark.parametrize("make", [NewtonKrylov, LeastSquares])
def test_it_is_saved_and_resumed(make: type) -> None:
    model = network()
    optimizer = make(model.parameters(), average=ExponentialAverage(0.7))
    for count in range(4):
        step(optimizer, model, count)
    other = copy.deepcopy(model)
    resumed = make(other.parameters(), average=ExponentialAverage(0.7))
    resumed.load_state_dict(optimizer.state_dict())
    for count in range(4, 7):
        step(optimizer, model, count)
        step(resumed, other, count)
    with optimizer.averaged(), resumed.averaged():
        assert torch.equal(vector(model), vector(other))


def test_a_state_without_an_average_begins_one() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters())
    step(optimizer, model, 0)
    resumed = NewtonKrylov(model.parameters(), average=ExponentialAverage())
    step(resumed, model, 0)
    resumed.load_state_dict(optimizer.state_dict())
    step(resumed, model, 1)
    now = vector(model)
    with resumed.averaged():
        assert torch.equal(vector(model), now)
    NewtonKrylov(model.parameters()).load_state_dict(resumed.state_dict())


def test_a_step_that_is_undone_is_not_averaged() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), average=TailAverage(0.0))
    step(optimizer, model, 0)
    optimizer.step(lambda: model(X).sum() * float("nan"))
    now = vector(model)
    with optimizer.averaged():
        assert torch.equal(vector(model), now)
    assert optimizer.state_dict()["newton_krylov"]["average"]["count"] == 1


def test_other_parameters_begin_another_average() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), average=TailAverage())
    step(optimizer, model, 0)
    model[0].requires_grad_(False)
    step(optimizer, model, 1)
    now = vector(model)
    with optimizer.averaged():
        assert torch.equal(vector(model), now)


def test_half_precision_is_averaged_in_single() -> None:
    model = network().to(torch.bfloat16)
    optimizer = NewtonKrylov(model.parameters(), average=TailAverage(0.0))
    iterates = []
    for _ in range(6):
        optimizer.step(lambda: F.cross_entropy(model(X.bfloat16()).float(), LABELS))
        iterates.append(vector(model).float())
    with optimizer.averaged():
        assert torch.equal(vector(model), (sum(iterates) / 6).bfloat16())


def test_buffers_of_the_model_are_put_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = NewtonKrylov(model.parameters(), average=ExponentialAverage())
    step(optimizer, model, 0)
    before = model[0].running_mean.clone()
    with optimizer.averaged(model):
        torch.optim.swa_utils.update_bn([(X,)], model)
        assert not torch.equal(model[0].running_mean, before)
    assert torch.equal(model[0].running_mean, before)


def test_what_has_no_meaning_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="keeps no average"), NewtonKrylov(model.parameters()).averaged():
        pass
    with pytest.raises(TypeError, match="average must be an Averaging"):
        NewtonKrylov(model.parameters(), average=0.9)
    with pytest.raises(ValueError, match="decay"):
        ExponentialAverage(1.0)
    with pytest.raises(ValueError, match="power"):
        TailAverage(-1.0)
    optimizer = NewtonKrylov(model.parameters(), average=ExponentialAverage())
    with optimizer.averaged(), pytest.raises(RuntimeError, match="Leave averaged"):
        step(optimizer, model, 0)
    with optimizer.averaged(), pytest.raises(RuntimeError, match="already"), optimizer.averaged():
        pass
