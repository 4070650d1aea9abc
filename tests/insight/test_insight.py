"""Influence, Laplace, saliencies and error bars, against retraining, closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep
from imstep import insight, spectral
from imstep.curvature import EKFAC, KFAC, Categorical, Gaussian, GaussNewtonDiagonal
from imstep.linalg import DenseOperator, LinearOperator, NotSolvedError

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def retrained(x: Tensor, y: Tensor, kept: Tensor, decay: float, start: Tensor) -> Tensor:
    """Weights of logistic regression on some of the examples; the loss is still a sum over them divided by all."""

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        v = torch.tensor(w, requires_grad=True)
        loss = F.binary_cross_entropy_with_logits(x[kept] @ v, y[kept], reduction="sum") / len(x)
        loss = loss + decay / 2 * v.square().sum()
        (g,) = torch.autograd.grad(loss, v)
        return loss.item(), g.numpy()

    found = scipy.optimize.minimize(value, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10})
    return torch.tensor(found.x)


def test_influence_is_that_of_leaving_out_and_training_anew() -> None:
    x, decay = normal(60, 3), 0.05
    y = (x @ torch.tensor([1.0, -2.0, 0.5], dtype=F64) + normal(60, seed=2) > 0).double()
    everything = torch.arange(60)
    w = nn.Parameter(retrained(x, y, everything, decay, torch.zeros(3, dtype=F64)))
    tests = normal(4, 3, seed=1)
    losses = lambda: F.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
    target = lambda: F.softplus(tests @ w)
    H = imstep.Hessian(lambda: losses().mean() + decay / 2 * w.square().sum(), [w])
    found = insight.influence(H, losses, target)
    assert found.shape == (60, 4)
    before, exact = target().detach(), torch.empty(60, 4, dtype=F64)
    for out in range(0, 60, 12):
        again = retrained(x, y, everything[everything != out], decay, w.detach())
        exact[out] = F.softplus(tests @ again) - before
    picked = slice(0, 60, 12)
    # First order in 1/60: a few percent of the largest.
    assert float((found - exact)[picked].abs().max()) < 0.12 * float(exact[picked].abs().max())
    assert float(torch.corrcoef(torch.stack([found[picked].flatten(), exact[picked].flatten()]))[0, 1]) > 0.995
    # The same by the definition, and with damping.
    rows = torch.func.jacrev(lambda v: F.binary_cross_entropy_with_logits(x @ v, y, reduction="none"))(w.detach())
    to = torch.func.jacrev(lambda v: F.softplus(tests @ v))(w.detach())
    dense = H.to_dense()
    for damping in (0.0, 0.3):
        expected = rows @ torch.linalg.solve(dense + damping * torch.eye(3), to.T) / 60
        torch.testing.assert_close(insight.influence(H, losses, target, damping=damping), expected)
    torch.testing.assert_close(insight.influence(H, losses, target, weight=1.0), 60 * found)
    one = insight.influence(H, losses, lambda: F.softplus(tests[0] @ w))
    torch.testing.assert_close(one, found[:, 0])
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    each = lambda batch: F.binary_cross_entropy_with_logits(batch[0] @ w, batch[1], reduction="none")
    torch.testing.assert_close(insight.influence(H, imstep.Jacobian.over(batches, each, [w]), target), found)


def test_influence_refuses_what_it_cannot_say() -> None:
    w, other, x = nn.Parameter(torch.ones(2, dtype=F64)), nn.Parameter(torch.ones(2, dtype=F64)), normal(5, 2)
    losses = lambda: (x @ w) ** 2
    H = imstep.Hessian(lambda: losses().mean(), [w])
    with pytest.raises(ValueError, match='reduction="none"'):
        insight.influence(H, lambda: losses().mean(), lambda: w.sum())
    with pytest.raises(ValueError, match="different parameters"):
        insight.influence(H, imstep.Jacobian(lambda: x @ other, [other]), lambda: w.sum())
    with pytest.raises(ValueError, match="belongs to no parameters"):
        insight.influence(DenseOperator(torch.eye(2, dtype=F64)), losses, lambda: w.sum())
    singular = imstep.Hessian(lambda: (x[:, 0] * w[0]).square().mean() + 0 * w[1], [w])
    with pytest.raises(NotSolvedError, match="raise damping"):
        insight.influence(singular, losses, lambda: w.sum())


# Bayesian linear regression with known noise: posterior, predictive and evidence in closed form.
NOISE, PRIOR = 0.3, 2.0


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    x, w = normal(40, 3), torch.tensor([1.0, -0.5, 2.0], dtype=F64)
    y = x @ w + math.sqrt(NOISE) * normal(40, seed=1)
    model = nn.Linear(3, 1, bias=False).double()
    precision = x.T @ x / NOISE + PRIOR * torch.eye(3)
    model.weight.data = torch.linalg.solve(precision, x.T @ y / NOISE)[None]
    return model, x, y[:, None]


LINEAR: dict[str, Callable[[nn.Module, Tensor, Tensor], LinearOperator]] = {
    "full": lambda m, x, y: imstep.Fisher(lambda: (m(x), y), m, Gaussian(NOISE)),
    "Gauss-Newton": lambda m, x, y: imstep.GaussNewton(
        lambda: (m(x), y), m, lambda z, t: (z - t).square().sum() / (2 * NOISE * len(x))
    ),
    "low rank": lambda m, x, y: spectral.low_rank(imstep.Fisher(lambda: (m(x), y), m, Gaussian(NOISE)), 3),
    "by layer": lambda m, x, y: imstep.Fisher(lambda: (m(x), y), m, Gaussian(NOISE)).block_diagonal(),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_laplace_is_bayesian_linear_regression(kind: str) -> None:
    model, x, y = regression()
    posterior = insight.Laplace(LINEAR[kind](model, x, y), cases=40, prior_precision=PRIOR)
    covariance = torch.linalg.inv(x.T @ x / NOISE + PRIOR * torch.eye(3))
    torch.testing.assert_close(posterior.covariance.to_dense(), covariance, rtol=1e-5, atol=1e-8)
    new = normal(6, 3, seed=2)
    found = posterior.predictive(lambda: model(new))
    torch.testing.assert_close(found.mean, model(new).detach())
    torch.testing.assert_close(found.covariance, new @ covariance @ new.T, rtol=1e-5, atol=1e-8)
    assert found.variance.shape == (6, 1)
    noise = torch.distributions.Normal(model(x).detach(), math.sqrt(NOISE))
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(40, dtype=F64), NOISE * torch.eye(40, dtype=F64) + x @ x.T / PRIOR
    )
    evidence = posterior.log_evidence(float(noise.log_prob(y).sum()))
    assert evidence.value == pytest.approx(float(marginal.log_prob(y[:, 0])), rel=1e-6)


def classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, normal(30, 3), torch.arange(30) % 3


def generalised_gauss_newton(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, Tensor]:
    """N times the matrix, and the Jacobian of the first two cases' logits, by autograd."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    own = {name: named[name] for name in names}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, {**named, **p}, (x,)))(own)
    J = torch.cat([part.flatten(2) for part in rows.values()], dim=2)
    p = model(x).softmax(1).detach()
    inside = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", J, inside, J), J[:2].flatten(0, 1)


def test_laplace_of_all_weights_and_of_the_last_layer() -> None:
    model, x, y = classifier()
    names = [name for name, _ in model.named_parameters()]
    for part, own in ((model, names), (model[2], names[2:])):
        A = imstep.Fisher(lambda: (model(x), y), part, Categorical())
        found = insight.Laplace(A, cases=30, prior_precision=0.5).predictive(lambda: model(x[:2]))
        matrix, J = generalised_gauss_newton(model, own, x)
        expected = J @ torch.linalg.solve(matrix + 0.5 * torch.eye(len(matrix)), J.T)
        torch.testing.assert_close(found.covariance, expected, rtol=1e-5, atol=1e-8)
    drawn = found.sample(20_000, seed=3)
    assert drawn.shape == (20_000, 2, 3)
    assert drawn.equal(found.sample(20_000, seed=3))
    spread = 0.05 * float(found.variance.max())
    torch.testing.assert_close(drawn.flatten(1).T.cov(), found.covariance, rtol=0, atol=spread)
    torch.testing.assert_close(drawn.mean(0), found.mean, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_laplace_by_kronecker_factors_is_that_of_their_matrix(kind: type[KFAC]) -> None:
    model, x, y = classifier()
    K = kind(lambda: F.cross_entropy(model(x), y), model)
    found = insight.Laplace(K, cases=30, prior_precision=0.5).predictive(lambda: model(x[:2]))
    _, J = generalised_gauss_newton(model, [name for name, _ in model.named_parameters()], x)
    expected = J @ torch.linalg.solve(30 * K.to_dense() + 0.5 * torch.eye(K.size), J.T)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-6, atol=1e-9)


def test_laplace_refuses_what_it_cannot_say() -> None:
    model, x, y = classifier()
    F_ = imstep.Fisher(lambda: (model(x), y), model, Categorical())
    for cases, precision in ((0, 1.0), (30, 0.0), (30, math.inf)):
        with pytest.raises(ValueError, match="infinitely wide"):
            insight.Laplace(F_, cases, precision)
    with pytest.raises(ValueError, match="one number for all weights, got 3"):
        insight.Laplace(F_, 30, torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prior does not outweigh"):
        insight.Laplace(-1.0 * F_, cases=30, prior_precision=1e-3)
    insight.Laplace(-1.0 * F_, cases=30, prior_precision=1e3)


def quadratic() -> tuple[Tensor, Tensor, nn.Parameter, imstep.Hessian]:
    """A function with its minimum at w."""
    half, w = normal(6, 6), normal(6, seed=1)
    matrix = half @ half.T + torch.eye(6)
    parameter = nn.Parameter(w.clone())
    H = imstep.Hessian(lambda: (parameter - w) @ matrix @ (parameter - w) / 2, [parameter])
    return matrix, w, parameter, H


def brute_force(matrix: Tensor, w: Tensor, zero: list[int]) -> tuple[float, Tensor]:
    """The least value where some entries are zero, and where it is."""
    rest = [i for i in range(len(w)) if i not in zero]
    v = torch.zeros_like(w)
    v[rest] = w[rest] + torch.linalg.solve(matrix[rest][:, rest], matrix[rest][:, zero] @ w[zero])
    return float((v - w) @ matrix @ (v - w)) / 2, v


def test_saliencies_are_those_of_brute_force() -> None:
    matrix, w, _, H = quadratic()
    found = insight.saliencies(H)
    expected = [brute_force(matrix, w, [i])[0] for i in range(6)]
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=F64))
    torch.testing.assert_close(insight.saliencies(H, [4, 1]).values, found.values[[4, 1]])
    for zero in ([2], [5, 0, 3]):
        removed, (least, at) = insight.removal(H, zero), brute_force(matrix, w, zero)
        assert removed.increase == pytest.approx(least)
        torch.testing.assert_close(w + removed.update, at)
        assert not (w + removed.update)[zero].any()


def test_saliencies_of_a_block_leave_the_rest_as_it_is() -> None:
    model, x, y = classifier()
    G = imstep.GaussNewton(lambda: (model(x), y), model, F.cross_entropy)
    block, bias = G.block([model[2].weight, model[0].bias]), model[0].bias.detach()
    found = insight.saliencies(block, range(15, 20), damping=0.1)
    inverse = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(20))
    torch.testing.assert_close(found.values, bias**2 / (2 * inverse.diagonal()[15:]))
    assert list(block.diagonal_blocks("layer")) == ["2", "0"]


def test_saliencies_of_a_diagonal_are_optimal_brain_damage() -> None:
    model, x, y = classifier()
    D = GaussNewtonDiagonal(lambda: (model(x), y), model, F.cross_entropy)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(insight.saliencies(D, damping=0.1).values, weights**2 * (D.diagonal + 0.1) / 2)


def test_saliencies_refuse_what_has_no_meaning() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    saddle = imstep.Hessian(lambda: w[0] ** 2 - w[1] ** 2, [w])
    for ask in (lambda: insight.saliencies(saddle), lambda: insight.removal(saddle, [0, 1])):
        with pytest.raises(ValueError, match="not positive definite"):
            ask()
    # The inverse's diagonal is zero but for rounding, which may be positive.
    for scale in (1.0, 0.3, 7.0, 1e3):
        for dtype in (F64, torch.float32):
            v = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
            crossed = imstep.Hessian(lambda v=v, scale=scale: scale * v[0] * v[1] + v[2] ** 2, [v])
            for ask in (lambda H=crossed: insight.saliencies(H), lambda H=crossed: insight.removal(H, [0])):
                with pytest.raises(ValueError, match="not positive definite"):
                    ask()
    assert insight.saliencies(saddle, damping=3.0).values.tolist() == pytest.approx([2.5, 0.5])
    with pytest.raises(ValueError, match="named twice"):
        insight.removal(saddle, [0, 0], damping=3.0)
    large = nn.Parameter(torch.ones(5000))
    with pytest.raises(ValueError, match="Pass the index"):
        insight.saliencies(imstep.Hessian(lambda: large.square().sum(), [large]))


def test_the_covariance_of_a_fit_is_that_of_scipy() -> None:
    t = torch.linspace(0, 4, 30, dtype=F64)
    y = 3e-6 * torch.exp(-0.8 * t) + 5e-7 + 2e-8 * normal(30)
    curve = lambda b, t: b[0] * torch.exp(-b[1] * t) + b[2]
    formula = lambda t, a, k, c: a * np.exp(-k * t) + c
    x, expected = scipy.optimize.curve_fit(formula, t.numpy(), y.numpy(), p0=[3e-6, 0.8, 5e-7], xtol=1e-14, ftol=1e-14)
    fit = insight.parameter_covariance(lambda b: curve(b, t) - y, torch.tensor(x))
    np.testing.assert_allclose(fit.matrix, expected, rtol=1e-4)
    assert fit.distance < 1e-4
    rows = torch.func.jacrev(lambda b: curve(b, t))(torch.tensor(x))
    band = fit.standard_errors_of(lambda b: curve(b, t)[:, None])[:, 0]
    torch.testing.assert_close(band, (rows @ fit.matrix @ rows.T).diag().sqrt())
    torch.testing.assert_close(fit.correlation.diagonal(), torch.ones(3, dtype=F64))
    held = insight.parameter_covariance(lambda b: curve(b, t) - y, torch.tensor(x), variance=4e-16, free=[0, 2])
    inside = rows[:, [0, 2]]
    expected = 4e-16 * torch.linalg.inv(inside.T @ inside)
    torch.testing.assert_close(held.matrix[[0, 2]][:, [0, 2]], expected, rtol=1e-9, atol=0)
    assert float(held.standard_errors[1]) == 0
    moved = torch.tensor(x) + fit.standard_errors * torch.tensor([0, 1, 0])
    off = insight.parameter_covariance(lambda b: curve(b, t) - y, moved)
    assert off.distance > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": -1.0}, "a number >= 0, got -1.0"),
        ({"variance": math.nan}, "a number >= 0, got nan"),
        ({"variance": torch.ones(9)}, r"divided by them, in the fit, too, and pass variance=1\.0"),
        ({"variance": "absolute"}, "a number >= 0, got 'absolute'"),
        ({"free": []}, "names no parameter"),
        ({"free": [3]}, "the position 3, and there are 3 parameters"),
        ({"free": [0, -3]}, r"once, got \[0, 0\]"),
        ({"free": [True, False]}, "a mask of 2 entries for 3"),
        ({"free": [0.5]}, "positions or is a mask"),
    ],
)
def test_arguments_of_a_covariance_are_checked(options: dict[str, object], message: str) -> None:
    t, b = torch.linspace(0, 1, 9, dtype=F64), torch.ones(3, 1, dtype=F64)
    residuals = lambda b: b[0] + b[1] * t + b[2] * t**2 - t**3
    with pytest.raises(ValueError, match=message):
        insight.parameter_covariance(residuals, b, **options)
    with pytest.raises(TypeError, match=r"got ndarray. Pass torch\.as_tensor"):
        insight.parameter_covariance(residuals, b.numpy())
    with pytest.raises(TypeError, match=r"torch\.int64; parameters of a fit are real floating point"):
        insight.parameter_covariance(residuals, b.long())
    mask = insight.parameter_covariance(residuals, b, free=torch.tensor([[True], [False], [True]]))
    for free in ([0, 2], [-3, -1], torch.tensor([0, 2]), [True, False, True]):
        assert torch.equal(mask.matrix, insight.parameter_covariance(residuals, b, free=free).matrix)


@pytest.mark.parametrize("unit", [2.0**-80, 2.0**80])
def test_errors_whose_squares_leave_the_range_of_single_precision(unit: float) -> None:
    t = torch.linspace(0, 4, 30)
    y, line = 3 + 2 * t + 0.1 * torch.sin(40 * t), lambda b: b[0] + b[1] * t
    one = insight.parameter_covariance(lambda b: line(b) - y, torch.tensor([3.0, 2.0]))
    fit = insight.parameter_covariance(lambda b: line(b / unit) - y, torch.tensor([3.0, 2.0]) * unit)
    torch.testing.assert_close(fit.standard_errors / unit, one.standard_errors)
    torch.testing.assert_close(fit.correlation, one.correlation)
    torch.testing.assert_close(fit.standard_errors_of(line) / unit, one.standard_errors_of(line))


def test_a_covariance_that_is_not_there_is_refused() -> None:
    t = torch.linspace(0, 1, 9, dtype=F64)
    b = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with pytest.raises(ValueError, match=r"along \(1, -1, -?0\)|along \(-1, 1, -?0\)|along \((1|-1), (1|-1), .*e-"):
        insight.parameter_covariance(lambda b: (b[0] + b[1]) * t + b[2], b)
    with pytest.raises(ValueError, match="do not depend on parameter 1"):
        insight.parameter_covariance(lambda b: b[0] * t + b[2], b)
    with pytest.raises(ValueError, match="Return the residuals, not the sum of their squares"):
        insight.parameter_covariance(lambda b: (b[0] + b[1] * t + b[2]).square().sum(), b)
    with pytest.raises(ValueError, match="Pass variance="):
        insight.parameter_covariance(lambda b: b * t[1:4], b)
    with pytest.raises(ValueError, match="names no parameter"):
        insight.parameter_covariance(lambda b: b * t[1:4], b, variance=1.0, free=[False] * 3)
    exact = insight.parameter_covariance(lambda b: b * t[1:4], b, variance=1.0)
    torch.testing.assert_close(exact.standard_errors, 1 / t[1:4])
    with pytest.raises(ValueError, match="do not determine"):
        insight.parameter_covariance(lambda b: b.sum() * t[1:3], b, variance=1.0)


def test_influence_takes_a_block_of_the_curvature() -> None:
    """As of one layer; against the matrix of it written out."""
    x, y = normal(12, 3), torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    H = imstep.Hessian(lambda: F.cross_entropy(model(x), y), model)
    losses, target = lambda: F.cross_entropy(model(x), y, reduction="none"), lambda: model(x)[0, 0]
    last = list(model[2].parameters())
    rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses()[i], last)]) for i in range(12)]
    asked = torch.cat([g.reshape(-1) for g in torch.autograd.grad(target(), last)])
    matrix = H.to_dense()[-15:, -15:] + torch.eye(15, dtype=F64)
    expected = torch.stack(rows) @ torch.linalg.solve(matrix, asked) / 12
    found = insight.influence(H.block(model[2]), losses, target, damping=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("none", [[], torch.zeros(2, dtype=torch.bool)])
def test_no_weights_at_all_may_be_asked_about(none: list[int] | Tensor) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    H = imstep.Hessian(lambda: (w[0] - 1) ** 2 + (w.sum() - 3) ** 2, [w])
    assert insight.saliencies(H, none).values.shape == (0,)
    cut = insight.removal(H, none)
    assert cut.increase == 0
    assert not cut.update.any()
    with pytest.raises(ValueError, match="free names no parameter"):
        insight.parameter_covariance(lambda b: b.sum() * torch.ones(3) - 1, torch.ones(2), free=none)


def test_evidence_converges_by_its_own_value() -> None:
    w, x = nn.Parameter(torch.zeros(1200, dtype=F64)), normal(50, 1200)
    fisher = imstep.Fisher(lambda: (x @ w, torch.zeros(50, dtype=F64)), [w], Gaussian())
    posterior = insight.Laplace(fisher, 50, 1.0)
    found = posterior.log_evidence(0.0)
    assert found.error > 0
    assert posterior.log_evidence(1e9 * found.error).converged
    assert not posterior.log_evidence(-found.value).converged
