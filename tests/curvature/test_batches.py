"""Operators over many batches: equal to one of all the data, the same each time, and clear about what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import build, normal, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import imstep
from imstep.curvature import Categorical, Empirical, Exact, MeanOverSamples, MonteCarlo, SumOverBatches
from imstep.curvature.operators import PointOperator

X, LABELS = normal(10, 4), torch.arange(10) % 3
SIZES = (4, 4, 2)
BATCHES = list(zip(X.split(SIZES), LABELS.split(SIZES), strict=True))
Make = Callable[..., PointOperator]


def network() -> nn.Module:
    return build("mlp")[0]


def hessian(model: nn.Module, batches: Any, **options: Any) -> PointOperator:
    return imstep.Hessian.over(batches, lambda b: F.cross_entropy(model(b[0]), b[1]), model, **options)


def gauss_newton(model: nn.Module, batches: Any, **options: Any) -> PointOperator:
    return imstep.GaussNewton.over(batches, lambda b: (model(b[0]), b[1]), model, F.cross_entropy, **options)


def fisher(model: nn.Module, batches: Any, **options: Any) -> PointOperator:
    return imstep.Fisher.over(batches, lambda b: (model(b[0]), b[1]), model, Categorical(), **options)


def empirical(model: nn.Module, batches: Any, **options: Any) -> PointOperator:
    closure = lambda b: (model(b[0]), b[1])
    return imstep.Fisher.over(batches, closure, model, Categorical(), Empirical(), **options)


def monte_carlo(model: nn.Module, batches: Any, **options: Any) -> PointOperator:
    closure = lambda b: (model(b[0]), b[1])
    return imstep.Fisher.over(batches, closure, model, Categorical(), MonteCarlo(2), **options)


KINDS: dict[str, Make] = {"Hessian": hessian, "GaussNewton": gauss_newton, "Fisher": fisher, "empirical": empirical}


def some_budget(make: Make) -> int:
    """Room for the records of the first batch and of half of the second."""
    first, both = (make(network(), BATCHES[:k], memory_budget=None).nbytes for k in (1, 2))
    return (first + both) // 2


@pytest.mark.parametrize("recorded", [3, 1, 0])
@pytest.mark.parametrize("name", KINDS)
def test_batches_make_up_the_whole(name: str, recorded: int) -> None:
    make, model = KINDS[name], network()
    budget = {3: None, 1: some_budget(make), 0: 0}[recorded]
    whole = make(model, [(X, LABELS)])
    operator = make(model, BATCHES, memory_budget=budget)
    assert (operator.batches, operator.recorded) == (3, recorded)
    assert (operator.recomputes is None) == (recorded == 3)
    assert operator.definite == whole.definite
    assert float(operator.loss) == pytest.approx(float(whole.loss), rel=1e-13)
    assert relative_error(operator.gradient, whole.gradient) < 1e-13
    block = normal(operator.size, 3)
    expected = whole @ block
    for _ in range(2):
        assert relative_error(operator @ block, expected) < 1e-12
        assert relative_error(operator @ block[:, 0], expected[:, 0]) < 1e-12
    assert operator.products == 8
    assert (operator @ block[:, :0]).shape == (operator.size, 0)


def test_one_batch_is_the_plain_operator() -> None:
    model = network()
    plain = imstep.Hessian(lambda: F.cross_entropy(model(X), LABELS), model)
    assert relative_error(hessian(model, [(X, LABELS)]).to_dense(), plain.to_dense()) < 1e-14


def test_sums_and_other_weights() -> None:
    model = network()
    closure = lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum")
    plain = imstep.Hessian(lambda: closure((X, LABELS)), model)
    v = normal(plain.size)
    total = imstep.Hessian.over(BATCHES, closure, model, reduction=SumOverBatches())
    assert float(total.loss) == pytest.approx(float(plain.loss), rel=1e-13)
    assert relative_error(total @ v, plain @ v) < 1e-13
    means = lambda b: F.cross_entropy(model(b["x"]), b["y"])
    named = [{"y": y, "x": x, "name": "some"} for x, y in BATCHES]
    by_length = imstep.Hessian.over(named, means, model)
    assert relative_error(by_length @ v, plain @ v / 10) < 1e-13
    even = imstep.Hessian.over(named, means, model, reduction=MeanOverSamples(count=lambda b: 1))
    parts = [imstep.Hessian(lambda b=b: means(b), model) @ v for b in named]
    assert relative_error(even @ v, sum(parts) / 3) < 1e-13


class Noisy(nn.Module):
    """Draws numbers and moves statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_loss_that_is_a_sum_adds_batches_up() -> None:
    model, loss = network(), nn.CrossEntropyLoss(reduction="sum")
    closure = lambda b: (model(b[0]), b[1])
    whole = imstep.GaussNewton(lambda: closure((X, LABELS)), model, loss)
    summed = imstep.GaussNewton.over(BATCHES, closure, model, loss)
    v = normal(whole.size)
    assert relative_error(summed @ v, whole @ v) < 1e-12


@pytest.mark.parametrize("make", [hessian, gauss_newton, monte_carlo])
def test_randomness_is_frozen_batch_by_batch(make: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Noisy().double()
        start, before = torch.get_rng_state(), [b.clone() for b in model.buffers()]
        kept = make(model, BATCHES, memory_budget=None)
        after = torch.get_rng_state()
        torch.set_rng_state(start)
        anew = make(model, BATCHES, memory_budget=0)
        assert torch.equal(torch.get_rng_state(), after)
        assert not torch.equal(after, start)
        assert float(kept.loss) == pytest.approx(float(anew.loss), rel=1e-13)
        block = normal(kept.size, 2)
        first = anew @ block
        assert torch.equal(anew @ block, first)
        assert relative_error(first, kept @ block) < 1e-12
        assert torch.equal(torch.get_rng_state(), after)
        assert all(torch.equal(b, old) for b, old in zip(model.buffers(), before, strict=True))


def test_batches_draw_numbers_of_their_own() -> None:
    """Equal batches, but each with its own mask."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Noisy().double()
        model.body[1].eval()
        state = torch.get_rng_state()
        alone = hessian(model, BATCHES[:1])
        torch.set_rng_state(state)
        twice = hessian(model, [BATCHES[0], BATCHES[0]])
    assert abs(float(alone.loss) - float(twice.loss)) > 1e-3


def test_batches_draw_targets_of_their_own() -> None:
    model = network()
    v = normal(83)
    once, twice = (monte_carlo(model, BATCHES[:1] * count) @ v for count in (1, 2))
    assert relative_error(twice, once) > 1e-3


def with_noise(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    x, y = default_collate(items)
    return [x + 0.1 * torch.randn(x.shape, dtype=x.dtype), y]


def test_shuffling_and_noise_by_the_global_generator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Noisy().double()
        loader = DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True, collate_fn=with_noise)
        state = torch.get_rng_state()
        kept = hessian(model, loader, memory_budget=None)
        torch.set_rng_state(state)
        anew = hessian(model, loader, memory_budget=some_budget(hessian))
        assert 0 < anew.recorded < anew.batches == 3
        torch.manual_seed(99)
        v = normal(kept.size)
        assert relative_error(anew @ v, kept @ v) < 1e-12


def test_other_batches_than_at_first_are_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True, generator=generator)
    operator = hessian(network(), loader, memory_budget=0)
    with pytest.raises(RuntimeError, match="the same batches in the same order"):
        operator @ normal(operator.size)
    shrinking = list(BATCHES)
    operator = hessian(network(), shrinking, memory_budget=0)
    shrinking.pop()
    with pytest.raises(RuntimeError, match="ended after 2 batches"):
        operator @ normal(operator.size)


def test_batches_are_not_held() -> None:
    """Only one batch at a time is in memory where there are no records."""
    alive = 0

    class Counted:
        def __init__(self, x: Tensor) -> None:
            nonlocal alive
            self.x, alive = x, alive + 1
            assert alive <= 2  # the next one is made before the last is let go

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Streamed:
        def __iter__(self) -> Iterator[Counted]:
            return (Counted(normal(2, 4, seed=i)) for i in range(6))

    model = network()
    closure = lambda b: model(b.x).pow(2).mean()
    operator = imstep.Hessian.over(
        Streamed(), closure, model, reduction=MeanOverSamples(lambda b: len(b.x)), memory_budget=0
    )
    operator @ normal(operator.size, 2)
    assert alive == 0
    assert operator.batches == 6


def test_progress_is_told() -> None:
    told: list[tuple[int, int | None]] = []
    operator = hessian(network(), BATCHES, memory_budget=0, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    operator @ normal(operator.size, 2)
    assert told == [(1, 3), (2, 3), (3, 3)]

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(BATCHES)

    told.clear()
    hessian(network(), Unsized(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, None), (2, None), (3, None)]


def test_says_what_is_recomputed() -> None:
    operator = hessian(network(), BATCHES, memory_budget=some_budget(hessian))
    assert operator.recomputes is not None
    assert "2 of 3 batches" in operator.recomputes
    assert "the first of 3 batches" in str(operator.explain())
    assert operator.nbytes <= some_budget(hessian)


def test_moved_parameters_are_noticed() -> None:
    for budget in (None, 0):
        model = network()
        operator = hessian(model, BATCHES, memory_budget=budget)
        model[0].weight.data.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place"):
            operator @ normal(operator.size)


def test_refusals() -> None:
    model = network()
    with pytest.raises(TypeError, match="only once"):
        hessian(model, iter(BATCHES))
    with pytest.raises(TypeError, match=r"generator\)"):
        hessian(model, (b for b in BATCHES))
    with pytest.raises(ValueError, match="no batches"):
        hessian(model, [])
    with pytest.raises(ValueError, match="memory_budget"):
        hessian(model, BATCHES, memory_budget=-1)
    with pytest.raises(ValueError, match="no tensor whose length"):
        imstep.Hessian.over([0, 1], lambda b: model(X).sum(), model)
    with pytest.raises(ValueError, match="0 samples together"):
        hessian(model, BATCHES, reduction=MeanOverSamples(count=lambda b: 0))


# --- means that are not over samples ----------------------------------------------------------------------------------

_W = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
_RAGGED = ((0, 3), (3, 6), (6, 8))
_UNLIKE = {
    "class weights": (lambda z, y, k: F.cross_entropy(z, y, weight=_W), lambda y, k: _W[y].sum()),
    "ignored labels": (lambda z, y, k: F.cross_entropy(z, y.where(k, -100)), lambda y, k: k.sum()),
    "beside a penalty": (lambda z, y, k: F.cross_entropy(z, y.where(k, -100)) / 2 + 1.0, lambda y, k: k.sum()),
    "smoothed": (
        lambda z, y, k: F.cross_entropy(z, y.where(k, -100), label_smoothing=0.1),
        lambda y, k: k.sum(),
    ),
    "indexed by a mask": (lambda z, y, k: F.cross_entropy(z, y, reduction="none")[k].mean(), lambda y, k: k.sum()),
    "times a mask": (
        lambda z, y, k: (F.cross_entropy(z, y, reduction="none") * k).sum() / k.sum(),
        lambda y, k: k.sum(),
    ),
    "squares by a mask": (lambda z, y, k: F.mse_loss(z[k], 0 * z[k].detach()), lambda y, k: k.sum()),
}
_ALIKE = {
    "mean": lambda z, y, k: F.cross_entropy(z, y),
    "beside a mean over parameters": lambda z, y, k: z.square().mean() + 0.1 * _W.square().mean(),
    "sum by size": lambda z, y, k: z.square().sum() / len(z),
    "a part of a mean": lambda z, y, k: F.mse_loss(z, 0 * z.detach()) / 4,
}


def _parts():
    model, x = build("mlp")
    labels, kept = torch.arange(8) % 3, torch.tensor([1, 1, 0, 1, 1, 0, 0, 1]).bool()
    return model, (x, labels, kept), [(x[a:b], labels[a:b], kept[a:b]) for a, b in _RAGGED]


@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", _UNLIKE)
def test_means_over_something_else_are_refused_unless_told(name, memory_budget, backward):
    loss, count = _UNLIKE[name]
    model, whole, parts = _parts()

    def closure(batch):
        found = loss(model(batch[0]), *batch[1:])
        return found.backward() if backward else found

    with pytest.raises(ValueError, match=r"is a mean over .* entries"):
        imstep.Hessian.over(parts, closure, model, memory_budget=memory_budget)
    told = MeanOverSamples(count=lambda batch: count(*batch[1:]))
    H = imstep.Hessian.over(parts, closure, model, reduction=told, memory_budget=memory_budget)
    assert relative_error(H.to_dense(), imstep.Hessian(lambda: closure(whole), model).to_dense()) < 1e-12


@pytest.mark.parametrize("name", _ALIKE)
def test_means_over_samples_are_taken(name):
    model, whole, parts = _parts()
    closure = lambda batch: _ALIKE[name](model(batch[0]), *batch[1:])
    H = imstep.Hessian.over(parts, closure, model)
    assert relative_error(H.to_dense(), imstep.Hessian(lambda: closure(whole), model).to_dense()) < 1e-12


@pytest.mark.parametrize("memory_budget", [0, None])
def test_means_of_outputs_are_looked_at(memory_budget):
    model, _, parts = _parts()
    labels = lambda batch: (model(batch[0]), batch[1].where(batch[2], -100))
    with pytest.raises(ValueError, match="is a mean over 2 entries"):
        imstep.GaussNewton.over(parts, labels, model, loss=nn.CrossEntropyLoss(), memory_budget=memory_budget)
    for expectation in (Exact(), Empirical(), MonteCarlo()):
        with pytest.raises(ValueError, match="is a mean over 2 entries"):
            imstep.Fisher.over(parts, labels, model, Categorical(), expectation, memory_budget=memory_budget)


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_sums_are_not_averaged(loss):
    model, _, parts = _parts()
    closure = lambda batch: loss(model(batch[0]), torch.ones(len(batch[0]), 3, dtype=torch.float64), reduction="sum")
    with pytest.raises(ValueError, match=r"are sums .*SumOverBatches\(\)"):
        imstep.Hessian.over(parts, closure, model)
    imstep.Hessian.over(parts[:1], closure, model)


@pytest.mark.parametrize("end", [0, 2])
@pytest.mark.parametrize("memory_budget", [0, None])
def test_batches_that_count_nothing_are_left_out(memory_budget, end):
    model, whole, parts = _parts()
    parts.insert(end, (whole[0][:2], whole[1][:2], torch.zeros(2, dtype=torch.bool)))
    closure = lambda batch: F.cross_entropy(model(batch[0]), batch[1].where(batch[2], -100))
    told = MeanOverSamples(count=lambda batch: batch[2].sum())
    H = imstep.Hessian.over(parts, closure, model, reduction=told, memory_budget=memory_budget)
    assert relative_error(H.to_dense(), imstep.Hessian(lambda: closure(whole), model).to_dense()) < 1e-12


def test_lengths_that_contradict_each_other_are_refused():
    """A list of pictures, or a table first; what another tensor goes with is taken."""
    model, _, parts = _parts()
    loss = lambda batch: model(batch["x"] if isinstance(batch, dict) else torch.stack(batch)).square().mean()
    table = torch.ones(4)
    for batches in ([{"t": table, "x": x} for x, *_ in parts], [list(x) for x, *_ in parts]):
        with pytest.raises(ValueError, match="none of the other tensors goes with that"):
            imstep.Hessian.over(batches, loss, model)
    assert imstep.Hessian.over([{"x": x, "t": table, "y": y} for x, y, _ in parts], loss, model).batches == 3


def squares(z: torch.Tensor) -> torch.Tensor:
    return (z - 1) ** 2


SUMS = {
    "squares": lambda z: squares(z).sum(),
    "half of them": lambda z: 0.5 * squares(z).sum(),
    "entries, then samples": lambda z: squares(z).sum(1).sum(),
    "log-probabilities": lambda z: -torch.distributions.Normal(z, 1.0).log_prob(torch.ones_like(z)).sum(),
    "an evidence bound": lambda z: F.mse_loss(z, z.detach() + 1, reduction="sum") - 0.5 * torch.sum(1 + z - z.exp()),
}
MEANS = {
    "a quotient": lambda z: squares(z).sum() / len(z),
    "a multiple": lambda z: (1 / len(z)) * squares(z).sum(),
    "scaled residuals": lambda z: (((z - 1) / len(z) ** 0.5) ** 2).sum(),
    "weights": lambda z: (squares(z) * torch.full((len(z), 1), 1 / len(z))).sum(),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_by_hand_are_not_averaged(name: str) -> None:
    model = network()
    batches = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match=r"are sums .*SumOverBatches\(\)"):
        imstep.Hessian.over(batches, lambda x: SUMS[name](model(x)), model)
    imstep.Hessian.over(batches, lambda x: SUMS[name](model(x)), model, reduction=SumOverBatches())


FUNCTIONS_OF_MEANS = {
    "root of a mean": lambda z: squares(z).mean().sqrt(),
    "root of the mean squared error": lambda z: F.mse_loss(z, torch.ones_like(z)) ** 0.5 + 0.1 * z.square().mean(),
    "norm": lambda z: 2 * (z - 1).norm() / len(z) ** 0.5,
    "norms of columns": lambda z: (z - 1).norm(dim=0).sum(),
    "variance": lambda z: z.var(),
    "logarithm of a mean": lambda z: squares(z).mean().log(),
    "roots of means of columns": lambda z: squares(z).mean(0).sqrt().mean(),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_MEANS)
def test_functions_of_means_are_not_averaged(name: str) -> None:
    model = network()
    batches = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
    loss = lambda x: FUNCTIONS_OF_MEANS[name](model(x))
    with pytest.raises(ValueError, match="no means over samples but functions of such"):
        imstep.Hessian.over(batches, loss, model)
    imstep.Hessian.over(batches[:1], loss, model)
    imstep.Hessian.over(batches, loss, model, reduction=MeanOverSamples(count=len))


def test_functions_of_each_sample_and_of_parameters_are_averaged() -> None:
    model = network()
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (4, 4, 3)]
    rough = lambda x: (model(x) - 1).norm(dim=1).mean() + sum(p.norm() for p in model.parameters())
    whole = imstep.Hessian(lambda: rough(torch.cat(batches)), model)
    torch.testing.assert_close(imstep.Hessian.over(batches, rough, model).to_dense(), whole.to_dense())


@pytest.mark.parametrize("name", MEANS)
def test_means_by_hand_are_taken(name: str) -> None:
    model = network()
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (4, 4, 3)]
    whole = imstep.Hessian(lambda: MEANS[name](model(torch.cat(batches))), model)
    torch.testing.assert_close(
        imstep.Hessian.over(batches, lambda x: MEANS[name](model(x)), model).to_dense(), whole.to_dense()
    )
