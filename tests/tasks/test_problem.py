"""Tasks are functions of their seed; epochs hold every example once; evaluations are plain means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imstep.tasks import TASKS, Batch, ExampleProblem, Problem, TaskError, UnknownTaskError, get_task
from imstep.tasks import examples as examples_module

DIGITS = [name for name in TASKS if name.startswith("digits")]


def counting_problem(examples: int) -> Problem:
    """Inputs are 0, 1, 2, ..., so that a batch says which examples it holds."""
    inputs = torch.arange(examples, dtype=torch.float64).reshape(-1, 1)
    batch = Batch(inputs, inputs)
    return ExampleProblem("counting", nn.Linear(1, 1).double(), batch, batch, nn.MSELoss())


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_an_epoch_holds_every_example_once(examples: int, batch_size: int, epoch: int, seed: int) -> None:
    problem = counting_problem(examples)
    batches = list(problem.batches(epoch, batch_size, seed))
    sizes = [len(batch) for batch in batches]
    assert len(batches) == problem.batch_count(batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    seen = torch.cat([batch.inputs for batch in batches]).flatten().tolist()
    assert sorted(seen) == list(range(examples))
    for batch in batches:
        assert torch.equal(batch.inputs, batch.targets)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    problem = counting_problem(64)

    def order(epoch: int, seed: int) -> list[float]:
        return torch.cat([b.inputs for b in problem.batches(epoch, 16, seed)]).flatten().tolist()

    first = order(1, 0)
    torch.manual_seed(123)
    assert order(1, 0) == first
    others = [order(0, 0), order(0, 1), order(2, 0)]
    assert all(first != other for other in others)


def test_the_full_batch_is_the_training_set_itself() -> None:
    problem = counting_problem(5)
    assert list(problem.batches(3)) == [problem.train]


@pytest.mark.parametrize("name", DIGITS)
def test_the_same_seed_gives_the_same_start_in_every_type(name: str) -> None:
    one, two, other = (get_task(name).build(seed) for seed in (3, 3, 4))
    double = get_task(name).build(3, dtype=torch.float64)
    vectors = [nn.utils.parameters_to_vector(p.parameters) for p in (one, two, other, double)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    assert torch.equal(vectors[0], vectors[3].float())
    assert double.train.inputs.dtype == torch.float64
    assert one.size == len(vectors[0])
    # Data and split do not depend on the seed.
    assert torch.equal(one.heldout.inputs, other.heldout.inputs)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    get_task("digits-mlp").build(7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DIGITS)
def test_a_digits_task_can_be_trained(name: str) -> None:
    problem = get_task(name).build(0, examples=100)
    assert (len(problem.train), len(problem.heldout)) == (100, 297)
    loss = problem.closure(problem.train)()
    loss.backward()
    assert loss.ndim == 0
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in problem.parameters)


def test_digits_are_split_without_overlap() -> None:
    problem = get_task("digits-mlp").build(0)
    assert (len(problem.train), len(problem.heldout)) == (1500, 297)
    assert problem.train.inputs.min() == 0
    assert problem.train.inputs.max() == 1
    assert torch.equal(problem.train.targets.unique(), torch.arange(10))


def test_evaluation_in_chunks_is_the_mean_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = get_task("digits-mlp").build(0, dtype=torch.float64)
    logits = problem.model(problem.heldout.inputs)
    expected = nn.functional.cross_entropy(logits, problem.heldout.targets).item()
    right = sum(
        int(row.argmax() == label) for row, label in zip(logits, problem.heldout.targets, strict=True)
    )
    for chunk in (7, 100, 10_000):
        monkeypatch.setattr(examples_module, "EVALUATION_CHUNK", chunk)
        evaluation = problem.evaluate(problem.heldout)
        assert evaluation.loss == pytest.approx(expected, rel=1e-13)
        assert evaluation.metric == pytest.approx(right / 297, rel=1e-13)
        assert evaluation.examples == 297


def test_evaluation_disturbs_neither_modes_nor_statistics_nor_draws() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
    model[1].eval()
    batch = Batch(torch.randn(8, 3), torch.randn(8, 1))
    problem = ExampleProblem("t", model, batch, batch, nn.MSELoss())
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert problem.evaluate(batch).metric is None
    assert model.training
    assert not model[1].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_misuse_is_explained() -> None:
    with pytest.raises(TaskError, match="empty"):
        Batch(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(TaskError, match="3 inputs but 2 targets"):
        Batch(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(TaskError, match="batch_size=0"):
        next(counting_problem(3).batches(0, 0))
    with pytest.raises(TaskError, match="floating-point"):
        get_task("digits-mlp").build(dtype=torch.int64)
    with pytest.raises(TaskError, match="examples=0"):
        get_task("digits-mlp").build(examples=0)
    with pytest.raises(UnknownTaskError, match=r"Did you mean 'digits-cnn'\? Tasks: digits-autoencoder, "):
        get_task("digit-cnn")
