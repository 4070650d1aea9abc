"""Every curvature operator, on every kind of model, with every kind of loss, against its dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import (
    F64,
    MODELS,
    build,
    dense_gauss_newton,
    dense_jacobian,
    differentiable_kernels,
    hessian_products,
    normal,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import imstep
from imstep.curvature import (
    KFAC,
    Bernoulli,
    Categorical,
    Empirical,
    Exact,
    Expectation,
    Gaussian,
    Likelihood,
    ParameterVector,
    Poisson,
)
from imstep.curvature.operators import PointOperator
from imstep.linalg import DiagonalOperator, IdentityOperator, LinearOperator


def counts(*shape: int) -> Tensor:
    return (3 * normal(*shape, seed=1).abs()).floor()


def labels(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape[:-1]).numel()).reshape(shape[:-1]) % shape[-1]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def user_defined(z: Tensor, y: Tensor) -> Tensor:
    return ((z - y) ** 4).mean() + z.logsumexp(-1).mean()


def not_convex(z: Tensor, y: Tensor) -> Tensor:
    return torch.sin(3 * z * y).sum() + (z[0] * z[-1]).sum()


@dataclass(frozen=True)
class Loss:
    """A loss of outputs and targets, targets for outputs of a shape, and whether it counts as known to be convex."""

    value: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[..., Tensor]
    recognised: bool


LOSSES = {
    "mse": Loss(F.mse_loss, lambda *shape: normal(*shape, seed=1), True),
    "huber": Loss(F.huber_loss, lambda *shape: normal(*shape, seed=1), True),
    "cross entropy": Loss(cross_entropy, labels, True),
    "bce": Loss(F.binary_cross_entropy_with_logits, lambda *shape: (normal(*shape, seed=1) > 0).double(), True),
    "poisson": Loss(F.poisson_nll_loss, counts, True),
    "user-defined": Loss(user_defined, lambda *shape: normal(*shape, seed=1), False),
    "not convex": Loss(not_convex, lambda *shape: normal(*shape, seed=1), False),
}


class Setting:
    """A model, its loss and all that a matrix is made of."""

    def __init__(self, model: str, loss: str) -> None:
        self.model, self.inputs = build(model)
        self.params = list(self.model.parameters())
        self.loss = LOSSES[loss]
        self.targets = self.loss.targets(*self.model(self.inputs).shape)

    def outputs(self) -> Tensor:
        return self.model(self.inputs)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.outputs(), self.targets

    def value(self) -> Tensor:
        return self.loss.value(*self.pair())

    def sandwich(self, middle: Callable[[Tensor], Tensor]) -> Tensor:
        """Jᵀ M J with M = ``middle(outputs)``, (m, m)."""
        z = self.outputs()
        jacobian = dense_jacobian(z, self.params)
        return jacobian.T @ middle(z.detach()) @ jacobian

    def gauss_newton(self) -> Tensor:
        return dense_gauss_newton(self.outputs(), self.params, lambda z: self.loss.value(z, self.targets))


def softmax_covariance(z: Tensor) -> Tensor:
    """Of gradients with respect to (N, C) logits, by going through all labels."""
    p = z.softmax(-1).reshape(-1, z.shape[-1])
    blocks = []
    for row in p:
        gradients = [row - e for e in torch.eye(len(row), dtype=F64)]
        blocks.append(sum(chance * torch.outer(g, g) for chance, g in zip(row, gradients, strict=True)))
    return torch.block_diag(*blocks) / len(p)


def variances(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of independent entries, over the number of cases."""
    return lambda z: of(z).reshape(-1).diag() / len(z)


LIKELIHOODS: list[tuple[Likelihood, str, Callable[[Tensor], Tensor]]] = [
    (Gaussian(variance=0.5), "mse", variances(lambda z: torch.full_like(z, 2.0))),
    (Categorical(), "cross entropy", softmax_covariance),
    (Bernoulli(), "bce", variances(lambda z: z.sigmoid() * (1 - z.sigmoid()))),
    (Poisson(), "poisson", variances(torch.exp)),
]


def rows_of_classes(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Classes where cross entropy looks for them: in dimension 1."""
    z, y = pair
    return (z, y) if y.shape == z.shape else (z.flatten(0, -2), y.flatten())


def empirical(setting: Setting, likelihood: Likelihood) -> Tensor:
    losses = likelihood.losses(*rows_of_classes(setting.pair()))
    gradients = dense_jacobian(losses, setting.params)
    return gradients.T @ gradients / len(gradients)


Build = Callable[..., PointOperator]


@dataclass(frozen=True)
class Case:
    """An operator, and its products by PyTorch's reverse mode."""

    name: str
    model: str
    loss: str
    build: Build
    products: Callable[[Setting, Tensor], Tensor]
    definite: bool

    def __str__(self) -> str:
        return f"{self.name}-{self.model}-{self.loss}"


def hessian(s: Setting, **options: int) -> PointOperator:
    return imstep.Hessian(s.value, s.model, **options)


def gauss_newton(s: Setting, **options: int) -> PointOperator:
    return imstep.GaussNewton(s.pair, s.model, s.loss.value, **options)


def fisher(likelihood: Likelihood, expectation: Expectation) -> Build:
    return lambda s, **options: imstep.Fisher(
        lambda: rows_of_classes(s.pair()), s.model, likelihood, expectation, **options
    )


def times(matrix: Callable[[Setting], Tensor]) -> Callable[[Setting, Tensor], Tensor]:
    return lambda setting, block: matrix(setting) @ block


def cases(model: str) -> Iterator[Case]:
    for name, loss in LOSSES.items():
        double = lambda s, block: hessian_products(s.value(), s.params, block)
        yield Case("Hessian", model, name, hessian, double, False)
        yield Case("GaussNewton", model, name, gauss_newton, times(Setting.gauss_newton), loss.recognised)
    for likelihood, loss, middle in LIKELIHOODS:
        exact = lambda s, m=middle: s.sandwich(m)
        observed = lambda s, p=likelihood: empirical(s, p)
        yield Case("Fisher", model, loss, fisher(likelihood, Exact()), times(exact), True)
        yield Case("empirical Fisher", model, loss, fisher(likelihood, Empirical()), times(observed), True)


CASES = [case for model in MODELS for case in cases(model)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_dense_matrices(case: Case) -> None:
    setting = Setting(case.model, case.loss)
    block = normal(sum(p.numel() for p in setting.params), 3, seed=5)
    with differentiable_kernels():
        expected, loss = case.products(setting, block), setting.value()
        gradient = dense_jacobian(loss, setting.params)[0]
    operator = case.build(setting)
    assert operator.recomputes is None
    assert operator.definite is case.definite
    assert relative_error(operator @ block, expected) < 1e-12
    assert relative_error(operator @ block[:, 0], expected[:, 0]) < 1e-12
    if "Fisher" not in case.name:
        torch.testing.assert_close((operator.loss, operator.gradient), (loss.detach(), gradient))


NAMES = [("Hessian", "user-defined"), ("GaussNewton", "not convex"), ("GaussNewton", "cross entropy")]
NAMES += [("Fisher", "cross entropy"), ("empirical Fisher", "poisson")]
SOME = [case for case in CASES if (case.name, case.loss) in NAMES]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_without_a_record(case: Case) -> None:
    setting = Setting(case.model, case.loss)
    replayed, recomputed = case.build(setting), case.build(setting, memory_budget=0)
    assert "memory budget" in recomputed.recomputes
    assert (recomputed.nbytes, recomputed.definite) == (0, case.definite)
    torch.testing.assert_close(recomputed.loss, replayed.loss)
    torch.testing.assert_close(recomputed.gradient, replayed.gradient)
    block = normal(replayed.size, 2, seed=5)
    assert relative_error(recomputed @ block, replayed @ block) < 1e-12
    assert relative_error(recomputed @ block[:, 1], replayed @ block[:, 1]) < 1e-12


@pytest.mark.parametrize("case", [c for c in SOME if c.model == "mlp"], ids=str)
def test_forms(case: Case) -> None:
    operator = case.build(Setting(case.model, case.loss))
    matrix = operator.to_dense()
    assert relative_error(matrix, matrix.T) < 1e-14
    assert (torch.linalg.eigvalsh(matrix).min() > -1e-14) == operator.definite
    v = normal(operator.size, seed=1)
    assert relative_error(operator.T @ v, matrix @ v) < 1e-13
    np.testing.assert_allclose(operator.to_scipy() @ v.numpy(), (matrix @ v).numpy(), atol=1e-13)


@given(st.sampled_from([c for c in SOME if c.model == "gru"]), st.integers(0, 2**31), st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_linear_and_symmetric(case: Case, seed: int, a: float) -> None:
    operator = case.build(Setting(case.model, case.loss))
    u, v = normal(operator.size, seed=seed), normal(operator.size, seed=seed + 1)
    image, other = operator @ u, operator @ v
    assert float((operator @ (a * u + v) - a * image - other).norm()) <= 1e-12 * float(image.norm() + other.norm())
    assert abs(float(u @ other - v @ image)) <= 1e-12 * float(u.norm() * other.norm())
    if operator.definite:
        assert float(u @ image) >= -1e-12 * float(u.norm() * image.norm())


def test_lists_of_tensors_in_and_out() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), torch.randn(5, 3)
    H = imstep.Hessian(lambda: model(x).square().mean(), model)
    directions = [torch.randn_like(p) for p in model.parameters()]
    flat = torch.cat([d.reshape(-1) for d in directions])
    product = H @ directions
    assert [t.shape for t in product] == [p.shape for p in model.parameters()]
    assert torch.cat([t.reshape(-1) for t in product]).equal(H @ flat)
    assert H.as_vector(H.as_parameters(flat)).equal(flat)
    head = H.block(model[2])
    assert [t.shape for t in head @ directions[2:]] == [(1, 2), (1,)]
    with pytest.raises(ValueError, match=r"4 tensors of shapes \(2, 3\), \(2,\).*got 3 of shapes"):
        H @ directions[1:]
    with pytest.raises(TypeError, match="holds tensors"):
        H @ [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"shape \(11,\), got \(3,\)"):
        H.as_parameters(flat[:3])


def test_blocks_by_layer_and_parameter() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double(), torch.randn(5, 3).double()
    H = imstep.Hessian(lambda: model(x).square().mean(), model)
    dense, places = H.to_dense(), {"0": slice(0, 8), "2": slice(8, 11)}
    blocks = H.diagonal_blocks("layer")
    assert list(blocks) == list(places)
    for name, at in places.items():
        torch.testing.assert_close(blocks[name].to_dense(), dense[at, at])
        torch.testing.assert_close((H + 2 * H).diagonal_blocks("layer")[name].to_dense(), 3 * dense[at, at])
    assert list(H.diagonal_blocks("parameter")) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    unnamed = imstep.Hessian(lambda: model(x).square().mean(), model.parameters())
    assert list(unnamed.diagonal_blocks("parameter")) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="built from a list of parameters"):
        unnamed.diagonal_blocks("layer")
    with pytest.raises(ValueError, match="by is 'layer' or 'parameter'"):
        H.diagonal_blocks("module")


MADE_OF_OTHERS: dict[str, Callable[[imstep.Hessian, imstep.Jacobian, nn.Module, Callable], LinearOperator]] = {
    "multiple": lambda H, J, model, loss: 2.0 * H,
    "shifted": lambda H, J, model, loss: H + 0.5 * IdentityOperator.like(H),
    "shift first": lambda H, J, model, loss: DiagonalOperator(torch.arange(11.0).double()) - H,
    "transpose": lambda H, J, model, loss: H.T,
    "product": lambda H, J, model, loss: J.T @ J,
    "inverse": lambda H, J, model, loss: H.inverse(damping=3.0),
    "block diagonal": lambda H, J, model, loss: H.block_diagonal("layer"),
    "K-FAC": lambda H, J, model, loss: KFAC(loss, model),
}


@pytest.mark.parametrize("kind", MADE_OF_OTHERS)
def test_what_is_made_of_a_models_matrix_knows_its_parameters(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double(), torch.randn(5, 3).double()
    loss = lambda: model(x).square().mean()
    H, J = imstep.Hessian(loss, model), imstep.Jacobian(lambda: model(x), model)
    A, v = MADE_OF_OTHERS[kind](H, J, model, loss), normal(11)
    dense = A.to_dense()
    for by, places in (("layer", [slice(0, 8), slice(8, 11)]), ("parameter", [slice(0, 6), slice(6, 8)])):
        blocks = list(A.diagonal_blocks(by).values())
        for block, at in zip(blocks, places, strict=False):
            torch.testing.assert_close(block.to_dense(), dense[at, at])
    as_list = A @ A.as_parameters(v)
    assert [t.shape for t in as_list] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(A.as_vector(as_list), dense @ v)


def test_lists_through_a_jacobian_and_its_transpose() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    J, u = imstep.Jacobian(lambda: model(x), model), torch.randn(5, 2).double()
    weight, bias = J.T @ [u]
    torch.testing.assert_close(weight, u.T @ x)
    torch.testing.assert_close(bias, u.sum(0))
    torch.testing.assert_close((J @ [weight, bias])[0], x @ weight.T + bias)
    with pytest.raises(ValueError, match="square"):
        J.diagonal_blocks("layer")
    with pytest.raises(ValueError, match="are something else"):
        (J @ J.T).diagonal_blocks("layer")


def test_names_follow_what_is_trained_and_tied() -> None:
    model = nn.Module()
    model.scale, model.one, model.two = nn.Parameter(torch.ones(2)), nn.Linear(2, 2), nn.Linear(2, 2)
    model.two.weight, model.one.bias.requires_grad = model.one.weight, False
    assert ParameterVector(model).names == ["scale", "one.weight", "two.bias"]
    assert list(ParameterVector(model).groups("layer")) == ["scale", "one", "two"]
