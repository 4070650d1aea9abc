"""Fisher matrices: sampled targets, conventions of scale, and the distributions themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, build, dense_jacobian, normal, relative_error
from torch import Tensor, distributions

import imstep
from imstep.curvature import (
    Bernoulli,
    Categorical,
    Empirical,
    Exact,
    Expectation,
    Gaussian,
    Likelihood,
    MonteCarlo,
    Poisson,
)

LABELS = torch.arange(8) % 3


def fisher(likelihood: Likelihood, expectation: Expectation, targets: Tensor = LABELS) -> imstep.Fisher:
    model, x = build("mlp")
    return imstep.Fisher(lambda: (model(x), targets), model, likelihood, expectation)


# --- sampled targets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Categorical):
    """Labels from a list in place of random ones."""

    lists: tuple[tuple[int, ...], ...] = ()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        number = int(torch.randint(len(self.lists), (), generator=generator))
        return torch.tensor(self.lists[number])


def test_is_the_mean_over_drawn_targets() -> None:
    one = (0, 2, 1, 1, 0, 2, 2, 0)
    model, x = build("mlp")
    losses = F.cross_entropy(model(x), torch.tensor(one), reduction="none")
    gradients = dense_jacobian(losses, list(model.parameters()))
    expected = gradients.T @ gradients / 8
    for samples in (1, 3):
        operator = fisher(Given((one,)), MonteCarlo(samples))
        assert relative_error(operator.to_dense(), expected) < 1e-13
    observed = fisher(Categorical(), Empirical(), torch.tensor(one))
    assert relative_error(observed.to_dense(), expected) < 1e-13


def test_several_draws_are_averaged() -> None:
    one, other = (0, 2, 1, 1, 0, 2, 2, 0), (1, 1, 2, 0, 0, 1, 0, 2)
    parts = [fisher(Given((labels,)), MonteCarlo()).to_dense() for labels in (one, other)]
    mixed = fisher(Given((one, other)), MonteCarlo(samples=50)).to_dense()
    share = float(((mixed - parts[1]) * (parts[0] - parts[1])).sum() / ((parts[0] - parts[1]) ** 2).sum())
    assert round(50 * share) == pytest.approx(50 * share, abs=1e-9)
    assert 0.2 < share < 0.8
    assert relative_error(share * parts[0] + (1 - share) * parts[1], mixed) < 1e-13


TARGETS = {
    Categorical(): LABELS,
    Bernoulli(): torch.ones(8, 3, dtype=F64),
    Poisson(): torch.ones(8, 3, dtype=F64),
    Gaussian(2.0): torch.ones(8, 3, dtype=F64),
}


@pytest.mark.parametrize("likelihood", TARGETS, ids=lambda likelihood: type(likelihood).__name__)
def test_converges_to_the_exact_matrix(likelihood: Likelihood) -> None:
    exact = fisher(likelihood, Exact(), TARGETS[likelihood]).to_dense()
    errors = [
        relative_error(fisher(likelihood, MonteCarlo(samples), TARGETS[likelihood]).to_dense(), exact)
        for samples in (4, 400)
    ]
    assert errors[1] < 0.12
    assert errors[1] < errors[0] / 3


def test_seeds() -> None:
    state = torch.get_rng_state()
    first, again, other = (fisher(Categorical(), MonteCarlo(2, seed)).to_dense() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 1e-3
    assert torch.equal(torch.get_rng_state(), state)


def test_products_without_a_record_meet_the_same_targets() -> None:
    model, x = build("mlp")
    closure, v = lambda: (model(x), LABELS), normal(83)
    kept = imstep.Fisher(closure, model, Categorical(), MonteCarlo(2))
    anew = imstep.Fisher(closure, model, Categorical(), MonteCarlo(2), memory_budget=0)
    assert relative_error(anew @ v, kept @ v) < 1e-13


def test_positive_semidefinite_of_low_rank() -> None:
    operator = fisher(Categorical(), MonteCarlo())
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert operator.definite
    assert values.min() > -1e-14
    assert int((values > 1e-12).sum()) <= 8


# --- scale ----------------------------------------------------------------------------------------------------------


def test_mean_over_cases() -> None:
    """As a mean cross entropy; d/2 times a mean squared error, which divides by the outputs d of a case as well."""
    model, x = build("mlp")
    y = normal(8, 3, seed=1)
    for loss, likelihood, targets, factor in [
        (F.cross_entropy, Categorical(), LABELS, 1.0),
        (F.mse_loss, Gaussian(), y, 3 / 2),
        (F.binary_cross_entropy_with_logits, Bernoulli(), y.sigmoid(), 3.0),
        (F.poisson_nll_loss, Poisson(), y.abs(), 3.0),
    ]:
        matrix = imstep.GaussNewton(lambda targets=targets: (model(x), targets), model, loss)
        operator = fisher(likelihood, Exact(), targets)
        assert relative_error(operator.to_dense(), factor * matrix.to_dense()) < 1e-13
        assert float(operator.loss) == pytest.approx(factor * float(matrix.loss), rel=1e-13)
        assert relative_error(operator.gradient, factor * matrix.gradient) < 1e-13


@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(), Empirical()])
def test_loss_and_gradient_are_those_of_the_observed_targets(expectation: Expectation) -> None:
    model, x = build("mlp")
    loss = F.cross_entropy(model(x), LABELS)
    operator = fisher(Categorical(), expectation)
    assert float(operator.loss) == pytest.approx(float(loss.detach()), rel=1e-13)
    assert relative_error(operator.gradient, dense_jacobian(loss, list(model.parameters()))[0]) < 1e-13


# --- distributions --------------------------------------------------------------------------------------------------

Z = normal(4, 3)


def densities() -> list[tuple[Likelihood, distributions.Distribution, Tensor]]:
    """Each with PyTorch's distribution, and the log-normaliser that is left out."""
    y = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    return [
        (Gaussian(2.0), distributions.Normal(Z, math.sqrt(2.0)), -0.5 * math.log(4 * math.pi) * torch.ones(3)),
        (Bernoulli(), distributions.Bernoulli(logits=Z), torch.zeros(3)),
        (Poisson(), distributions.Poisson(Z.exp()), -torch.lgamma(y + 1)),
    ]


@pytest.mark.parametrize(("likelihood", "density", "constant"), densities(), ids=["normal", "bernoulli", "poisson"])
def test_losses_and_samples(likelihood: Likelihood, density: distributions.Distribution, constant: Tensor) -> None:
    y = torch.tensor([0.0, 1.0, 1.0 if isinstance(likelihood, Bernoulli) else 2.0], dtype=F64).expand(4, 3)
    expected = -(density.log_prob(y) - constant).sum(1)
    torch.testing.assert_close(likelihood.losses(Z, y), expected)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([likelihood.sample(Z, generator) for _ in range(2000)])
    spread = density.variance.sqrt() / math.sqrt(2000)
    assert ((drawn.mean(0) - density.mean).abs() < 4 * spread).all()
    assert ((drawn.var(0) / density.variance - 1).abs() < 0.25).all()


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 4)])
def test_labels(shape: tuple[int, ...]) -> None:
    z, generator = normal(*shape), torch.Generator().manual_seed(0)
    drawn = torch.stack([Categorical().sample(z, generator) for _ in range(2000)])
    dim = min(1, z.ndim - 1)
    assert drawn.shape[1:] == (*shape[:dim], *shape[dim + 1 :])
    Categorical().losses(z, drawn[0])
    shares = torch.stack([(drawn == c).double().mean(0) for c in range(3)], dim=dim)
    assert (shares - z.softmax(dim)).abs().max() < 0.05


def test_refusals() -> None:
    with pytest.raises(ValueError, match="variance must be positive"):
        Gaussian(0.0)
    with pytest.raises(ValueError, match="samples is at least 1"):
        MonteCarlo(0)
    with pytest.raises(ValueError, match="seed is at least 0"):
        MonteCarlo(seed=-1)
    model, x = build("mlp")
    with pytest.raises(ValueError, match="memory_budget"):
        imstep.Fisher(lambda: (model(x), LABELS), model, Categorical(), memory_budget=-1)
    for expectation in (Exact(), MonteCarlo(), Empirical()):
        with pytest.raises(TypeError, match=r"outputs and the\s+targets apart"):
            imstep.Fisher(lambda: model(x), model, Categorical(), expectation)


@pytest.mark.parametrize("expectation", [Exact(), Empirical(), MonteCarlo(samples=2000)])
def test_ignored_labels_are_no_cases(expectation: Expectation) -> None:
    """The matrix is that of the other cases, whichever targets are averaged over."""
    model, x = build("mlp")
    labels = LABELS.clone()
    labels[[1, 2, 6]] = -100
    kept = labels != -100
    whole = imstep.Fisher(lambda: (model(x), labels), model, Categorical(), expectation)
    apart = imstep.Fisher(lambda: (model(x)[kept], labels[kept]), model, Categorical(), expectation)
    exact = not isinstance(expectation, MonteCarlo)
    assert relative_error(whole.to_dense(), apart.to_dense()) < (1e-13 if exact else 0.1)
    torch.testing.assert_close(whole.loss, F.cross_entropy(model(x), labels).detach())
    assert torch.equal(Categorical().counted(labels), kept)
    assert Categorical().counted(LABELS) is Categorical().counted(x) is None


def test_targets_that_would_make_more_outputs_are_refused() -> None:
    """They would be broadcast: (8, 3) less (8, 1, 3) are 64 differences for each output."""
    model, x = build("mlp")
    for likelihood in (Gaussian(), Poisson()):
        with pytest.raises(ValueError, match=r"outputs have the shape \(8, 3\), and targets \(8, 1, 3\)"):
            imstep.Fisher(lambda: (model(x), normal(8, 1, 3)), model, likelihood)


def test_classes_in_place_of_instances_are_refused() -> None:
    model, x = build("mlp")
    pair = lambda: (model(x), LABELS)
    with pytest.raises(TypeError, match=r"such as Categorical\(\), got the class Gaussian"):
        imstep.Fisher(pair, model, Gaussian)
    with pytest.raises(TypeError, match=r"no Expectation: .* such as Empirical\(\), got a str"):
        imstep.Fisher.over([0], lambda _: pair(), model, Categorical(), "empirical")
