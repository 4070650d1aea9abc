"""Rows of a Jacobian whose residuals change from one step to the next, beside a closed form or autograd row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from imstep.curvature import ResidualJacobian
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector

F32, F64 = torch.float32, torch.float64
Closure = Callable[[], Tensor]


def network(*sizes: int, dtype: torch.dtype = F64) -> nn.Sequential:
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def jacobians(model: nn.Module, closures: Sequence[Closure]) -> list[tuple[Tensor, Tensor]]:
    """J and the residuals of one evaluation after the other, each with what earlier ones have found."""
    known, parameters, found = KnownOwners(), ParameterVector(model), []
    for closure in closures:
        frozen = FrozenClosure(closure, parameters)
        J = ResidualJacobian.at(frozen, parameters, known)
        found.append((J.to_dense(), J.residuals))
        frozen.leave(accepted=True)
    return found


def by_rows(residuals: Tensor, model: nn.Module) -> Tensor:
    rows = [torch.autograd.grad(r, list(model.parameters()), retain_graph=True) for r in residuals]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).to(F64)


def test_small_rows_beside_large_ones():
    """In float32, where rounding of the large rows is as large as half of the small ones."""
    torch.manual_seed(0)
    model = network(2, 8, 8, 1, dtype=F32)
    x, y = torch.rand(20, 2), torch.rand(20, 1)

    def small(order: Tensor) -> Tensor:
        return (model(x) - y)[order]

    def closure(order: Tensor) -> Closure:
        return lambda: 1e8 * (model(x + 1) - 3).square().sum() + small(order).square().sum()

    orders = [torch.arange(20), *(torch.randperm(20) for _ in range(3))]
    for order, (J, residuals) in zip(orders, jacobians(model, [closure(order) for order in orders]), strict=True):
        exact = math.sqrt(2) * by_rows(small(order)[:, 0], model)
        at = residuals.abs() < 100
        assert at.sum() == 20
        assert torch.allclose(residuals[at], math.sqrt(2) * small(order)[:, 0].double(), rtol=1e-5)
        assert torch.allclose(J[at], exact, rtol=1e-3, atol=1e-4)


def test_few_rows_of_many():
    """In float32 two of 20,000 rows change places, which a sum over all hardly shows."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 1), torch.rand(20_000, 2), torch.rand(20_000, 1)
    order, other = torch.arange(20_000), torch.arange(20_000)
    other[[5, 12_000]] = torch.tensor([12_000, 5])
    closure = lambda order: lambda: (model(x) - y)[order].square().sum() / 2
    for at, (J, _) in zip((order, other), jacobians(model, [closure(order), closure(other)]), strict=True):
        assert torch.allclose(J, torch.cat([x, torch.ones(20_000, 1)], 1)[at].double())


@pytest.mark.parametrize("masked", [-math.inf, -1e9])
def test_masks_that_are_added_to_scores(masked):
    """Points go to the means of other groups, by a mask in the exponent alone."""
    torch.manual_seed(0)
    values = network(2, 5, 1)
    model = nn.ModuleList([values, nn.Linear(2, 1).to(F64)])

    def means(x: Tensor, group: Tensor) -> Tensor:
        mask = torch.where(group == torch.arange(3)[:, None], 0.0, masked).to(F64)
        weights = torch.exp(model[1](x)[:, 0] + mask)
        return (weights @ values(x))[:, 0] / weights.sum(1) - 1

    first = torch.arange(12) % 3
    draws = [(torch.rand(12, 2, dtype=F64), first if k < 12 else first[torch.randperm(12)]) for k in range(14)]
    closures = [lambda draw=draw: means(*draw).square().sum() / 2 for draw in draws]
    for draw, (J, _) in zip(draws, jacobians(model, closures), strict=True):
        assert torch.allclose(J, by_rows(means(*draw), model))


def test_rows_that_cancel_are_none_of_others():
    """Rotations between poses, some between a pose and itself, whose rows are rounding, and no sign of a fault."""
    torch.manual_seed(0)
    poses = nn.Parameter(torch.randn(40, 3, dtype=F64) * 0.3)
    first, second = torch.arange(39), torch.arange(1, 40)
    second[::5] = first[::5]
    known = torch.matrix_exp(torch.randn(39, 3, 3, dtype=F64).mul(0.1).tril(-1))
    known = torch.linalg.qr(known)[0]

    def rotations(index: Tensor) -> Tensor:
        x, y, z = poses[index].unbind(1)
        none = torch.zeros_like(x)
        return torch.matrix_exp(torch.stack([none, -z, y, z, none, -x, -y, x, none], 1).view(-1, 3, 3))

    def angles() -> Tensor:
        turn = known.mT @ rotations(first).mT @ rotations(second)
        return torch.stack([turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0]], 1)

    J = ResidualJacobian(lambda: angles().square().sum() / 2, [poses])
    assert J.explicit == ()
    exact = torch.stack([torch.autograd.grad(r, poses, retain_graph=True)[0].reshape(-1) for r in angles().flatten()])
    assert torch.allclose(J.to_dense(), exact)
