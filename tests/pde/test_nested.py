"""Operators of operators, such as ∇·(k∇u), against nested reverse mode in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import pde

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
SCALE = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
PARAMETERS = [*NET.parameters(), *SCALE.parameters()]
MATRIX = torch.randn(3, 3, dtype=torch.float64)
X = torch.rand(4, 2, dtype=torch.float64)


def standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def doubled(x: Tensor) -> Tensor:
    x[:, :1].mul_(2)
    return x


FIELDS = {
    "a column": lambda x: NET(x)[:, 0],
    "a sum": lambda x: NET(x).sum(1),
    "columns by name": lambda x: NET(x).unbind(1)[1] * x.unbind(1)[0],
    "by an index": lambda x: NET(x)[:, [2, 0]].prod(1),
    "chosen": lambda x: torch.where(x[:, 0] > 0.5, NET(x)[:, 0], NET(x)[:, 1]),
    "normalised": (lambda x: F.layer_norm(NET(x), (3,))[:, 0], lambda x: standardised(NET(x))[:, 0]),
    "norm": lambda x: NET(x).norm(dim=1),
    "addmm": lambda x: torch.addmm(torch.ones(3, dtype=torch.float64), NET(x), MATRIX)[:, 0],
    "angle": lambda x: torch.atan2(NET(x)[:, 0], NET(x)[:, 1]),
    "matrix": lambda x: (NET(x) @ MATRIX)[:, 0],
    "products": lambda x: (NET(x)[:, None] @ NET(x)[:, :, None])[:, 0, 0],
    "einsum": lambda x: torch.einsum("ni,ij,nj->n", NET(x), MATRIX, NET(x)),
    "softmax": lambda x: NET(x).softmax(1)[:, 0],
    "put together": lambda x: torch.cat([x, torch.stack([NET(x)[:, 1], x[:, 0]], 1)], 1).prod(1),
    "repeated": lambda x: NET(x)[:, :1].expand(-1, 3).prod(1),
    "complex": lambda x: torch.complex(NET(x)[:, 0], NET(x)[:, 1]).abs(),
    "extremum": lambda x: NET(x).max(1).values,
    "in place": lambda x: doubled(NET(x) * x[:, :1]).prod(1),
}


def slope(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True, materialize_grads=True)[0]


def divergence(field, x: Tensor) -> Tensor:
    return sum(slope(field(x)[:, i], x)[:, i] for i in range(2))


def laplacian(field, x: Tensor) -> Tensor:
    return divergence(lambda x: slope(field(x), x), x)


def conduction(x: Tensor) -> Tensor:
    return (1 + x[:, :1] ** 2) * SCALE(x).exp()


@pytest.mark.parametrize("name", FIELDS)
def test_operators_of_operators(name: str) -> None:
    field, plain = FIELDS[name] if isinstance(FIELDS[name], tuple) else (FIELDS[name], FIELDS[name])
    x = X.clone().requires_grad_()
    pairs = {
        "flux": (
            pde.divergence(lambda x: conduction(x) * pde.gradient(field, x), X),
            divergence(lambda x: conduction(x) * slope(plain(x), x), x),
        ),
        "third": (pde.gradient(lambda x: pde.laplacian(field, x), X), slope(laplacian(plain, x), x)),
        "fourth": (pde.laplacian(lambda x: pde.laplacian(field, x), X), laplacian(lambda x: laplacian(plain, x), x)),
    }
    for part, (got, expected) in pairs.items():
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=part)
    grads = lambda t: torch.autograd.grad(t.square().sum(), PARAMETERS, allow_unused=True, materialize_grads=True)
    for got, expected in zip(*map(grads, pairs["flux"]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


SINGLE = {
    "tensordot": lambda x: torch.tensordot(NET(x), MATRIX, 1),
    "tensordot of both": lambda x: torch.tensordot(NET(x), NET(x).T, 1).diagonal(),
    "directions": lambda x: F.normalize(NET(x), dim=1),
    "gated": lambda x: F.glu(torch.cat([NET(x), x[:, :1]], 1)),
    "matrix norm": lambda x: torch.linalg.norm(NET(x)[:, :, None] * x[:, None], dim=(1, 2)),
    "of complex numbers": lambda x: torch.linalg.vector_norm(torch.complex(NET(x), 2 * NET(x)), dim=1),
    "other norms": lambda x: NET(x).norm(3, 1) + torch.linalg.vector_norm(NET(x), 1, dim=1),
    "deviations": lambda x: NET(x).std(1) + torch.std(NET(x), dim=1, correction=0) * torch.std_mean(NET(x), 1)[0],
    "cosine": lambda x: F.cosine_similarity(NET(x), MATRIX[:1], dim=1) + nn.CosineSimilarity()(NET(x), x[:, :1]),
    "distances": lambda x: nn.PairwiseDistance(3.0)(NET(x), MATRIX[:1]) * F.pairwise_distance(NET(x), x[:, :1].sin()),
    "distance": lambda x: torch.stack([torch.dist(row, MATRIX[0]) for row in NET(x)]),
    "copied signs": lambda x: torch.copysign(NET(x), x[:, :1] - 0.5) + torch.copysign(x[:, :1], NET(x)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_functions_that_take_an_output_and_norms(name: str) -> None:
    field, x = SINGLE[name], X.clone().requires_grad_()
    columns = field(X).reshape(4, -1).shape[1]
    expected = [laplacian(lambda x, j=j: field(x).reshape(4, -1)[:, j], x) for j in range(columns)]
    got = pde.laplacian(field, X)
    torch.testing.assert_close(got.reshape(4, -1), torch.stack(expected, 1), rtol=1e-9, atol=1e-10)
    (grad,) = torch.autograd.grad(got.square().sum(), NET[0].weight)
    (expected_grad,) = torch.autograd.grad(torch.stack(expected, 1).square().sum(), NET[0].weight)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [torch.linalg.vector_norm, torch.norm])
def test_norms_have_no_slope_at_zero(function) -> None:
    u = pde.expand(lambda x: function(x, dim=1), torch.zeros(2, 2, dtype=torch.float64), laplacian=[0, 1])
    assert not torch.cat([u.value, u.first.flatten()]).any()


IMAGE = torch.rand(1, 1, 4, 4, dtype=torch.float64)
REFUSED = {
    "no forward mode": (
        lambda x: F.grid_sample(IMAGE, x[None, :, None], align_corners=False)[0, 0, :, 0],
        "grid_sample .* no forward",
    ),
    "points of both": (lambda x: pde.gradient(lambda z: SCALE(z) * x[:, :1], x)[:, 0], "depend on its own points"),
    "reverse mode within": (lambda x: torch.autograd.grad(SCALE(x).sum(), x, create_graph=True)[0], "pde.gradient"),
    "forward mode within": (lambda x: torch.func.jvp(SCALE, (x,), (torch.ones_like(x),))[1], "pde.directional"),
    "a transform within": (lambda x: torch.func.vmap(SCALE)(x), "torch.func"),
    "written into another": (lambda x: torch.mul(x, 2, out=torch.zeros_like(X)), "torch.cat"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_says_so(name: str) -> None:
    field, words = REFUSED[name]
    for operator in (pde.gradient, pde.laplacian):
        with pytest.raises(pde.ExpansionError, match=words):
            operator(field, X)
