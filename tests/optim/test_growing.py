"""Batches that grow: the sampler alone, with a loader, with an optimizer, resumed."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from optim_cases import LABELS, X, network, normal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from imstep.globalization import NormTest
from imstep.optim import GrowingBatches, GrowingPoints, NewtonKrylov, StepOutcome, StepRecord


def record(variance: float, norm: float = 1.0) -> StepRecord:
    return StepRecord(0, StepOutcome.ACCEPTED, None, 1.0, 1.0, norm, gradient_variance=variance)


def test_every_epoch_is_another_permutation_in_batches_of_nearly_one_size() -> None:
    batches = GrowingBatches(103, 10)
    epochs = [list(batches) for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(103))
        assert {len(batch) for batch in epoch} == {9, 10}
        assert len(epoch) == 11 == len(batches)
    assert epochs[0] != epochs[1]
    assert epochs == [list(again) for again in [GrowingBatches(103, 10)] * 3]
    assert epochs[0] != list(GrowingBatches(103, 10, seed=1))


def test_growth_within_an_epoch_leaves_no_example_out() -> None:
    batches, seen = GrowingBatches(103, 8, window=1, largest=20), []
    for batch in batches:
        seen.append(batch)
        batches.observe(record(variance=1.0), len(batch))
    assert sorted(itertools.chain(*seen)) == list(range(103))
    assert [len(batch) for batch in seen[:2]] == [8, 16]  # 95 left in batches of 16
    assert batches.size == 20 >= max(map(len, seen))


def test_a_decision_is_made_from_the_mean_of_a_window() -> None:
    batches = GrowingBatches(1000, 10, window=3, test=NormTest(theta=0.5, growth=100))
    for variance in (0.1, math.nan, 0.2):
        batches.observe(record(variance), 10)
    assert batches.size == 10
    batches.observe(record(3.0), 20)  # of a larger batch: 60 for one example
    assert batches.size == math.ceil((1 + 2 + 60) / 3 / 0.25)


def test_with_an_optimizer_and_a_loader_it_resumes_bit_for_bit() -> None:
    data = TensorDataset(X, LABELS)

    def objects() -> tuple[nn.Module, NewtonKrylov, GrowingBatches]:
        model = network()
        optimizer = NewtonKrylov.for_batches(model.parameters(), variance_every=2)
        return model, optimizer, GrowingBatches(len(data), 4, window=2)

    def run(model: nn.Module, optimizer: NewtonKrylov, batches: GrowingBatches, steps: int) -> list[int]:
        sizes: list[int] = []
        while len(sizes) < steps:
            for x, y in DataLoader(data, batch_sampler=batches):
                optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
                batches.observe(optimizer.last_step, len(x))
                sizes.append(len(x))
                if len(sizes) == steps:
                    break
        return sizes

    whole = objects()
    sizes = run(*whole, 12)
    assert sizes[0] == 4 < sizes[-1]
    for stop in (3, 9):
        first, second = objects(), objects()
        run(*first, stop)
        for part, other in zip(first, second, strict=True):
            other.load_state_dict(copy.deepcopy(part.state_dict()))
        assert run(*second, 12 - stop) == sizes[stop:]
        assert all(map(torch.equal, whole[0].parameters(), second[0].parameters()))
    with pytest.raises(ValueError, match="30 examples"):
        GrowingBatches(31, 4).load_state_dict(whole[2].state_dict())


def test_the_variance_is_measured_when_asked_for_and_counted_and_changes_no_step() -> None:
    weights, costs = [], []
    for every in (0, 3):
        model = network()
        optimizer = NewtonKrylov.for_batches(model.parameters(), variance_every=every)
        measured = []
        for _ in range(5):
            optimizer.step(lambda model=model: F.cross_entropy(model(X), LABELS))
            step = optimizer.last_step
            measured.append(math.isfinite(step.gradient_variance))
            assert step.cost.variances == measured[-1]
        assert measured == [every > 0 and at % 3 == 0 for at in range(5)]
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        costs.append(optimizer.cost.gradient_equivalents)
    assert torch.equal(*weights)
    assert costs[1] - costs[0] == pytest.approx(2 * 2 / 3)


def test_the_variance_is_that_of_the_part_that_the_curvature_is_taken_from() -> None:
    w, x = nn.Parameter(torch.zeros((), dtype=X.dtype)), normal(8)
    optimizer = NewtonKrylov.for_batches([w], variance_every=1)
    optimizer.step(lambda: (w - x).square().mean(), lambda: (w - x[:2]).square().mean())
    assert optimizer.last_step.gradient_variance == pytest.approx(float((x[0] - x[1]) ** 2))


def test_arguments_are_checked() -> None:
    for size, largest in ((0, None), (11, None), (5, 4), (5, 11)):
        with pytest.raises(ValueError, match="size"):
            GrowingBatches(10, size, largest=largest)
    with pytest.raises(ValueError, match="window"):
        GrowingBatches(10, 5, window=0)
    with pytest.raises(ValueError, match="variance_every"):
        NewtonKrylov([nn.Parameter(torch.ones(1))], variance_every=-1)


def losses(points: GrowingPoints, *pairs: tuple[float, float]) -> list[int]:
    counts = []
    for before, after in pairs:
        points.observe(StepRecord(0, StepOutcome.ACCEPTED, None, before, after, 1.0))
        counts.append(points.count)
    return counts


def test_points_grow_where_losses_at_new_ones_are_higher() -> None:
    points = GrowingPoints(10, largest=25, spread=2.4, factor=1.5, window=2)
    assert losses(points, (1.0, 0.5), (1.0, 0.2)) == [10, 10]  # one pair so far
    state = points.state_dict()
    assert losses(points, (0.6, 0.1)) == [15]  # 2 and 3, whose mean is 2.45
    assert losses(points, (0.1, 0.1), (0.1, 0.01), (0.1, 0.01), (0.1, 0.01)) == [15, 15, 15, 23]
    assert losses(points, (0.1, 0.01), (0.1, 0.01)) == [23, 25]
    again = GrowingPoints(10, largest=25, spread=2.4, factor=1.5, window=2)
    again.load_state_dict(state)
    assert losses(again, (0.6, 0.1)) == [15]


def test_losses_that_are_no_positive_numbers_say_nothing_of_points() -> None:
    points = GrowingPoints(10, largest=20, spread=2.0, window=1)
    assert losses(points, (1.0, 0.0), (1.0, 0.5), (math.nan, math.nan), (1.0, 0.1), (0.15, 0.1)) == [10] * 5
    assert losses(points, (1.0, 0.1)) == [20]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 30}, {"spread": 1.0}, {"factor": math.inf}, {"window": 0}])
def test_numbers_of_points_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need 1 <= count|more than 1"):
        GrowingPoints(**{"count": 10, "largest": 20, **wrong})
