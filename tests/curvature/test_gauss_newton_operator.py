"""The Gauss-Newton operator: what counts as outputs, what as loss, and what is neither."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, build, dense_gauss_newton, normal, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imstep.curvature import GaussNewton

LABELS, Y = torch.arange(8) % 3, normal(8, 3, seed=1)
either = pytest.mark.parametrize("budget", [None, 0])


def network() -> tuple[nn.Module, Tensor, list[Tensor]]:
    model, x = build("mlp")
    return model, x, list(model.parameters())


def operator(loss: Callable[[Tensor, Tensor], Tensor] | None, budget: int | None) -> tuple[GaussNewton, list[Tensor]]:
    model, x, params = network()
    return GaussNewton(lambda: (model(x), Y), model, loss, budget), [model(x), *params]


def assert_dense(matrix: Tensor, expected: Tensor) -> None:
    assert relative_error(matrix, expected) < 1e-12


@either
def test_outputs_are_what_the_closure_returns(budget: int | None) -> None:
    """Also where the loss bends them before its convex end, which NewtonKrylov would take for a part of the model."""
    loss = lambda z, y: F.mse_loss(z.tanh(), 2 * y)
    G, (z, *params) = operator(loss, budget)
    matrix = G.to_dense()
    assert_dense(matrix, dense_gauss_newton(z, params, lambda t: loss(t, Y)))
    assert not G.definite
    assert (torch.linalg.eigvalsh(matrix) < -1e-6).any()


@either
def test_loss_that_is_linear_in_the_outputs(budget: int | None) -> None:
    model, x, _ = network()
    G = GaussNewton(lambda: (model(x).log_softmax(1), LABELS), model, nn.NLLLoss(), budget)
    assert torch.equal(G @ normal(G.size), torch.zeros(G.size, dtype=F64))


@either
def test_mean_squared_error_is_the_default(budget: int | None) -> None:
    G, (z, *params) = operator(None, budget)
    assert_dense(G.to_dense(), dense_gauss_newton(z, params, lambda t: F.mse_loss(t, Y)))
    assert G.definite


@either
@pytest.mark.parametrize("sign", [1, -1])
def test_what_bypasses_the_outputs_is_exact(budget: int | None, sign: int) -> None:
    model, x, params = network()
    decay = lambda: sign * (params[-1] ** 2).sum()
    G = GaussNewton(lambda: (model(x), Y), model, lambda z, y: F.mse_loss(z, y) + decay(), budget)
    expected = dense_gauss_newton(model(x), params, lambda t: F.mse_loss(t, Y))
    expected[-3:, -3:] += 2 * sign * torch.eye(3, dtype=F64)
    assert_dense(G.to_dense(), expected)
    assert G.definite == (sign > 0)


@either
def test_products_of_outputs_and_parameters(budget: int | None) -> None:
    model, x, params = network()
    scale = nn.Parameter(normal(3, seed=3))
    loss = lambda z, scale: ((z * scale - Y) ** 2).sum()
    G = GaussNewton(lambda: (model(x), None), [*params, scale], lambda z, _: loss(z, scale), budget)
    together = torch.cat([model(x).reshape(-1), scale])
    expected = dense_gauss_newton(together, [*params, scale], lambda t: loss(t[:-3].view(8, 3), t[-3:]))
    assert_dense(G.to_dense(), expected)


@either
def test_loss_that_overwrites_the_outputs(budget: int | None) -> None:
    G, (z, *params) = operator(lambda z, y: z.sub_(y).pow(2).mean(), budget)
    assert_dense(G.to_dense(), dense_gauss_newton(z, params, lambda t: F.mse_loss(t, Y)))


@either
def test_outputs_in_a_tree(budget: int | None) -> None:
    """One output used twice, and targets that depend on the parameters as well."""
    model, x, params = network()

    def closure() -> tuple[dict[str, Tensor], Tensor]:
        z = model(x)
        return {"all": z, "again": z, "two": z[:, :2]}, model(x.flip(0))

    loss = lambda z, y: F.mse_loss(z["all"], y) + z["two"].pow(2).sum() + (z["again"] ** 4).mean()
    G = GaussNewton(closure, model, loss, budget)
    split = lambda t: ({"all": t[:8], "again": t[:8], "two": t[:8, :2]}, t[8:])
    expected = dense_gauss_newton(torch.cat([model(x), model(x.flip(0))]), params, lambda t: loss(*split(t)))
    assert_dense(G.to_dense(), expected)


@either
def test_checkpoints_in_model_and_loss(budget: int | None) -> None:
    model, x, params = network()
    again = partial(checkpoint, use_reentrant=False)
    loss = lambda z, y: F.mse_loss(z.tanh(), y)
    G = GaussNewton(lambda: (again(model, x), Y), model, lambda z, y: again(loss, z, y), budget)
    assert_dense(G.to_dense(), dense_gauss_newton(model(x), params, lambda t: loss(t, Y)))


@either
def test_unusable_closures(budget: int | None) -> None:
    model, x, _ = network()
    with pytest.raises(TypeError, match="outputs and the targets apart"):
        GaussNewton(lambda: model(x), model, F.mse_loss, budget)
    with pytest.raises(ValueError, match="one entry"):
        GaussNewton(lambda: (model(x), Y), model, lambda z, y: z - y, budget)
    with pytest.raises(ValueError, match=r"without a graph|none of the parameters"):
        GaussNewton(lambda: (model(x).detach(), Y), model, F.mse_loss, budget)
    with pytest.raises(ValueError, match="does not depend on the parameters, and the loss does"):
        GaussNewton(lambda: (x, Y), model, lambda z, y: F.mse_loss(model(z), y), budget)


def test_outputs_in_an_object_are_seen_or_refused() -> None:
    """As a distribution; a part of the Hessian stood for the matrix where no record was kept."""
    model, x, params = network()
    closure = lambda: (torch.distributions.Normal(model(x), 2.0), Y)
    loss = lambda p, y: -p.log_prob(y).mean()
    expected = dense_gauss_newton(model(x), params, lambda t: F.mse_loss(t, Y) / 8)
    assert_dense(GaussNewton(closure, model, loss).to_dense(), expected)
    with pytest.raises(TypeError, match=r"tuples, lists and dictionaries.*raise memory_budget"):
        GaussNewton(closure, model, loss, 0)


def test_a_logarithm_of_exponentials_that_are_outputs_is_not_convex_in_them() -> None:
    model, x = torch.nn.Linear(2, 2).double(), normal(5, 2)
    of = lambda outputs, loss: GaussNewton(lambda: (outputs(model(x)), None), model, loss)
    concave = of(torch.exp, lambda e, _: e.log1p().mean())
    assert not concave.definite
    assert torch.linalg.eigvalsh(concave.to_dense()).min() < -1e-6
    assert of(lambda z: z, lambda z, _: z.exp().log1p().mean()).definite
