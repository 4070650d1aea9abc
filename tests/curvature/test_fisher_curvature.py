"""Fisher matrices of a closure that returns its loss alone: against gradients of single cases by reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, dense_jacobian, normal, relative_error
from torch import Tensor, nn

from imstep.curvature import Empirical, Exact, Expectation, MonteCarlo, ParameterVector
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.penalty import Penalty
from imstep.curvature.pieces import FrozenPieces, Piece

N, C = 7, 3
LABELS = torch.arange(N) % C
ONES = torch.tensor([0.0, 1.0, 1.0], dtype=F64).expand(N, C)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, C)).double()


X, NET = normal(N, 4), model()
PARAMETERS = list(NET.parameters())


def matrix(
    expectation: Expectation, closure: Callable[[], Tensor], params: Any = None, step: int = 0, penalty: Any = None
) -> Tensor:
    vector = ParameterVector(params or PARAMETERS)
    frozen = FrozenClosure(closure, vector, penalty=penalty)
    point = frozen.linearise(keep_graph=expectation.needs_graph)
    return expectation.at(point, vector, step).to_dense()


def rows(losses: Tensor) -> Tensor:
    """Gradients of single cases' losses, (N, n)."""
    return dense_jacobian(losses, PARAMETERS)


def poisson(z: Tensor, y: Tensor) -> Tensor:
    return z.exp() - y * z


def logistic(z: Tensor, y: Tensor) -> Tensor:
    return F.softplus(z) - y * z


bernoulli = lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none")
probability = lambda z, y: F.binary_cross_entropy(z.sigmoid(), y, reduction="none")
gaussian = lambda z, y: F.mse_loss(z, y, reduction="none") / 2


def exact(name: str) -> Tensor:
    """Σ_i Σ_y p(y | x_i) ∇ℓ ∇ℓᵀ, by enumeration, or by the variance of the score for numbers without bound."""
    J = dense_jacobian(NET(X), PARAMETERS).view(N, C, -1)
    z = NET(X).detach()
    if name == "categorical":
        total = torch.zeros(J.shape[2], J.shape[2], dtype=F64)
        for label in range(C):
            g = rows(F.cross_entropy(NET(X), torch.full((N,), label), reduction="none"))
            total += g.T @ (z.softmax(1)[:, label, None] * g)
        return total
    variance = {"gaussian": torch.ones_like(z), "poisson": z.exp()}.get(name, z.sigmoid() * (1 - z.sigmoid()))
    return torch.einsum("ic,ica,icb->ab", variance, J, J)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli": bernoulli,
    "logistic": logistic,
    "log-sigmoid": lambda z, y: -F.logsigmoid((2 * y - 1) * z),
    "soft margin": lambda z, y: F.soft_margin_loss(z, 2 * y - 1, reduction="none"),
    "logarithm of an exponential": lambda z, y: (1 + ((1 - 2 * y) * z).exp()).log(),
    "logarithms of a sigmoid": lambda z, y: -torch.where(y > 0, z.sigmoid().log(), torch.log1p(-z.sigmoid())),
    "logarithms of a clamped sigmoid": lambda z, y: -(lambda p: torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p))(
        z.sigmoid().clamp(1e-7, 1 - 1e-7)
    ),
    "poisson": poisson,
    "gaussian": gaussian,
}


@pytest.mark.parametrize("name", LOSSES)
def test_exact_is_the_expectation_over_all_targets(name: str) -> None:
    loss = LOSSES[name]
    for reduce, factor in ((Tensor.mean, 1 / (N * C)), (Tensor.sum, 1.0)):
        found = matrix(Exact(), lambda reduce=reduce: reduce(loss(NET(X), ONES)))
        assert relative_error(found, factor * exact(name)) < 1e-12


def test_exact_of_labels() -> None:
    weights, some = torch.tensor([1.0, 2.0, 0.5], dtype=F64), LABELS.clone()
    some[2] = -100
    found = matrix(Exact(), lambda: F.cross_entropy(NET(X), LABELS))
    assert relative_error(found, exact("categorical") / N) < 1e-12
    for labels in (LABELS, some):
        w = torch.where(labels < 0, 0.0, weights[labels.clamp(min=0)])
        closure = lambda labels=labels: F.cross_entropy(NET(X), labels, weights)
        J, p = dense_jacobian(NET(X), PARAMETERS).view(N, C, -1), NET(X).detach().softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = torch.einsum("i,icd,ica,idb->ab", w / w.sum(), H, J, J)
        assert relative_error(matrix(Exact(), closure), expected) < 1e-12


def test_empirical_is_of_the_gradients_of_cases() -> None:
    g = rows(F.cross_entropy(NET(X), LABELS, reduction="none"))
    w = torch.tensor([1.0, 2.0, 0.5], dtype=F64)[LABELS]
    for closure, c in (
        (lambda: F.cross_entropy(NET(X), LABELS), torch.full((N,), 1 / N, dtype=F64)),
        (lambda: F.cross_entropy(NET(X), LABELS, reduction="sum"), torch.ones(N, dtype=F64)),
        (lambda: F.cross_entropy(NET(X), LABELS, torch.tensor([1.0, 2.0, 0.5], dtype=F64)), w / w.sum()),
        (lambda: -NET(X).log_softmax(1)[torch.arange(N), LABELS].mean(), torch.full((N,), 1 / N, dtype=F64)),
        (lambda: -NET(X).softmax(1)[torch.arange(N), LABELS].log().mean(), torch.full((N,), 1 / N, dtype=F64)),
    ):
        assert relative_error(matrix(Empirical(), closure), (g.T * c) @ g) < 1e-12
    for loss in (bernoulli, logistic, poisson, probability, LOSSES["log-sigmoid"], LOSSES["soft margin"]):
        g = rows(loss(NET(X), ONES).sum(1))
        for scale in (1.0, 0.1):
            found = matrix(Empirical(), lambda loss=loss, scale=scale: scale * loss(NET(X), ONES).sum(1).mean())
            assert relative_error(found, scale * g.T @ g / N) < 1e-12


def test_empirical_of_squared_errors_reads_the_loss_as_a_mean_over_cases() -> None:
    y = normal(N, C, seed=1)
    g = rows((NET(X) - y).square().mean(1))
    for closure in (
        lambda: F.mse_loss(NET(X), y),
        lambda: (NET(X) - y).square().mean(),
        lambda: F.mse_loss(y, NET(X)),
        lambda: (lambda r: (r * r).sum() / (N * C))(NET(X) - y),
    ):
        assert relative_error(matrix(Empirical(), closure), g.T @ g / N) < 1e-12


def test_monte_carlo_is_of_labels_drawn_by_the_seed_and_the_step() -> None:
    """By hand, with the labels that PyTorch draws from the model."""
    for seed, step in ((3, 0), (3, 5), (4, 5)):
        entropy = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(entropy)
        p, expected = NET(X).detach().softmax(1), torch.zeros(27, 27, dtype=F64)
        for _ in range(2):
            labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
            g = rows(F.cross_entropy(NET(X), labels, reduction="none"))
            expected += g.T @ g / (2 * N)
        found = matrix(MonteCarlo(2, seed), lambda: F.cross_entropy(NET(X), LABELS), step=step)
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("name", [*LOSSES, "categorical", "probability", "both sides"])
def test_monte_carlo_is_unbiased(name: str) -> None:
    if name == "categorical":
        closure, expected = lambda: F.cross_entropy(NET(X), LABELS), exact(name) / N
    elif name == "both sides":  # of a squared error depend on the parameters
        closure = lambda: F.mse_loss(NET(X), NET(2 * X), reduction="sum") / 2
        J = dense_jacobian(NET(X) - NET(2 * X), PARAMETERS)
        expected = J.T @ J
    else:
        loss = LOSSES.get(name, probability)
        closure, expected = lambda: loss(NET(X), ONES).mean(), exact(name) / (N * C)
    assert relative_error(matrix(MonteCarlo(400, 1), closure), expected) < 0.2


@pytest.mark.parametrize("moved", [lambda p: p, lambda p: p - 0.3, lambda p: (0.3 - 2 * p) / 2])
@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(2), Empirical()])
def test_what_a_loss_adds_of_parameters_alone_stays_exact(expectation: Expectation, moved) -> None:
    data = lambda: F.cross_entropy(NET(X), LABELS)
    plain, eye = matrix(expectation, data), torch.eye(27, dtype=F64)
    decayed = matrix(expectation, lambda: data() + 0.35 * sum(moved(p).square().sum() for p in PARAMETERS))
    assert relative_error(decayed, plain + 0.7 * eye) < 1e-12
    penalty = Penalty.of([0.3] * 4, ParameterVector(PARAMETERS))
    assert relative_error(matrix(expectation, data, penalty=penalty), plain + 0.3 * eye) < 1e-12


@pytest.mark.parametrize("expectation", [MonteCarlo(2), Empirical()])
def test_sharing_between_parameters_stays_exact(expectation: Expectation) -> None:
    p, q, x, y = normal(3).requires_grad_(), normal(3, seed=1).requires_grad_(), normal(5, 3, seed=2), normal(5, seed=3)
    data = lambda: F.mse_loss(x @ p, y) + 0 * q.sum()
    eye = 2 * torch.eye(3, dtype=F64)
    shared = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, eye], 1)])
    found = matrix(expectation, lambda: data() + (p - q).square().sum(), [p, q])
    assert relative_error(found, matrix(expectation, data, [p, q]) + shared) < 1e-12


@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(200), Empirical()])
def test_a_batch_in_pieces(expectation: Expectation) -> None:
    parts, V = [(slice(0, 3), 3 / N), (slice(3, N), 4 / N)], normal(27, 2)
    pieces = [Piece(w, lambda s=s: F.cross_entropy(NET(X[s]), LABELS[s])) for s, w in parts]
    vector = ParameterVector(PARAMETERS)
    operator = expectation.at(FrozenPieces(pieces, vector, False, None, None).linearise(), vector, 0)
    images, whole = operator @ V, matrix(expectation, lambda: F.cross_entropy(NET(X), LABELS)) @ V
    assert relative_error(images, whole) < (0.3 if isinstance(expectation, MonteCarlo) else 1e-12)
    assert torch.equal(operator @ V, images)  # the same targets every time


def test_several_losses_and_shapes() -> None:
    """Two heads, classes of pixels, a single number: each a distribution of its own."""
    w = nn.Parameter(normal(6))
    A, B, y = normal(5, 6, seed=1), normal(2, 3, 2, 6, seed=2), normal(5, seed=3)
    labels = torch.tensor([[0, 1], [2, 2]])
    data = lambda: F.mse_loss(A @ w, y) + 0.5 * F.cross_entropy(B @ w, labels) + (w.sum() - 1) ** 2
    p = (B @ w).detach().softmax(1).movedim(1, -1).reshape(4, 3)
    J = B.movedim(1, 2).reshape(4, 3, 6)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    of_labels = 0.5 / 4 * torch.einsum("icd,ica,idb->ab", H, J, J)
    expected = 2 / 5 * A.T @ A + of_labels + 2 * torch.ones(6, 6, dtype=F64)
    assert relative_error(matrix(Exact(), data, [w]), expected) < 1e-12
    assert relative_error(matrix(MonteCarlo(600), data, [w]), expected) < 0.2
    r, u = (A @ w - y).detach(), p - F.one_hot(labels.reshape(-1), 3)
    g, h = 2 * r[:, None] * A, torch.einsum("ic,ica->ia", u, J)
    one = 2 * (w.detach().sum() - 1) * torch.ones(1, 6, dtype=F64)
    observed = g.T @ g / 5 + 0.5 / 4 * h.T @ h + one.T @ one
    assert relative_error(matrix(Empirical(), data, [w]), observed) < 1e-12


def test_half_precision_of_outputs() -> None:
    net = model().float()
    x = X.float()

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = net(x)
        return F.cross_entropy(z.float(), LABELS)

    for expectation in (Exact(), Empirical(), MonteCarlo()):
        F_ = matrix(expectation, closure, list(net.parameters()))
        assert F_.dtype is torch.float32
        assert bool(F_.isfinite().all())


@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(), Empirical()])
def test_targets_that_require_gradients_of_others_are_constants(expectation: Expectation) -> None:
    teacher = normal(N, C).requires_grad_()
    expected = matrix(expectation, lambda: F.mse_loss(NET(X), teacher.detach()))
    assert expected.any()
    for closure in (lambda: F.mse_loss(NET(X), teacher), lambda: F.mse_loss(teacher, NET(X))):
        torch.testing.assert_close(matrix(expectation, closure), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(), Empirical()])
def test_cross_entropies_that_are_written_out(expectation: Expectation) -> None:
    z = lambda: NET(X)
    expected = matrix(expectation, lambda: F.cross_entropy(z(), LABELS))
    written_out = lambda z: (z.logsumexp(1) - z.gather(1, LABELS[:, None])[:, 0]).mean()
    for closure in (
        lambda: written_out(z()),
        lambda: (lambda z: z.exp().sum(1).log() - z.gather(1, LABELS[:, None])[:, 0])(z()).mean(),
        lambda: -torch.distributions.Categorical(logits=z()).log_prob(LABELS).mean(),
        lambda: -z().log_softmax(1).gather(1, LABELS[:, None]).mean(),
    ):
        torch.testing.assert_close(matrix(expectation, closure), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("expectation", [Exact(), MonteCarlo(), Empirical()])
def test_what_is_no_likelihood_is_refused(expectation: Expectation) -> None:
    for closure, words in (
        (lambda: NET(X).sin().sum(), "not recognised as one.*GaussNewtonFirst"),
        (lambda: NET(X).square().mean() + sum(p.norm() ** 2 for p in PARAMETERS), "squares of parameters"),
        (lambda: F.huber_loss(NET(X), ONES), "huber_loss is not -log p.*GaussNewtonFirst"),
        (lambda: F.smooth_l1_loss(NET(X), ONES) + NET(X).square().mean(), "smooth_l1_loss is not"),
    ):
        with pytest.raises(ValueError, match=words):
            matrix(expectation, closure)


def test_what_one_of_them_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"binary_cross_entropy takes probabilities.*with_logits; or use MonteCarlo"):
        matrix(Exact(), lambda: probability(NET(X), ONES).mean())

    def two_losses() -> Tensor:
        z = NET(X)
        return F.mse_loss(z, ONES) + F.cross_entropy(z, LABELS)

    def nested() -> Tensor:
        hidden = NET[0](X)
        return F.mse_loss(hidden, ONES) + F.cross_entropy(NET[2](hidden), LABELS)

    for closure in (two_losses, nested):
        with pytest.raises(ValueError, match="part of two losses or computed from another"):
            matrix(Empirical(), closure)
        assert bool(matrix(MonteCarlo(), closure).isfinite().all())
