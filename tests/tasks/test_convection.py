"""The convection task: its loss is the sum of three mean squares, and the solution has none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from imstep.curvature import ResidualJacobian
from imstep.tasks import Batch, ExampleProblem, Problem, get_task
from imstep.tasks.convection import BOUNDARY, INITIAL, INTERIOR, Convection

F64 = torch.float64


class Exact(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return torch.sin(points[:, :1] - 30 * points[:, 1:])


@pytest.fixture(scope="module")
def problem() -> Problem:
    return get_task("convection-sobol").build(0, dtype=F64)


def points(problem: Problem, kind: int) -> Tensor:
    return problem.train.inputs[problem.train.inputs[:, 0] == kind, 2:]


def test_the_loss_is_a_sum_of_three_means(problem: Problem) -> None:
    u = problem.model.network
    x = points(problem, INTERIOR).requires_grad_()
    slopes = torch.autograd.grad(u(x).sum(), x)[0]
    equation = (slopes[:, 1] + 30 * slopes[:, 0]).square().mean()
    start, edge = points(problem, INITIAL), points(problem, BOUNDARY)
    initial = (u(start)[:, 0] - start[:, 0].sin()).square().mean()
    sides = [u(torch.stack([torch.full_like(edge[:, 1], at), edge[:, 1]], 1)) for at in (0.0, 2 * math.pi)]
    jump = (sides[0] - sides[1]).square().mean()
    assert (len(x), len(start), len(edge)) == (2000, 128, 100)
    assert bool((start[:, 1] == 0).all())
    expected = (equation + initial + jump).item()
    assert problem.closure(problem.train)().item() == pytest.approx(expected, rel=1e-6)
    assert problem.evaluate(problem.train).loss == pytest.approx(expected, rel=1e-6)


def test_the_solution_misses_nothing(problem: Problem) -> None:
    exact = ExampleProblem("exact", Convection(Exact()), problem.train, problem.heldout, problem.loss)
    assert exact.evaluate(problem.train).loss < 1e-12  # the weights are those of float32
    assert exact.evaluate(problem.heldout).loss == 0


def test_heldout_is_the_squared_relative_error(problem: Problem) -> None:
    grid = problem.heldout.inputs[:, 2:]
    exact = (grid[:, 0] - 30 * grid[:, 1]).sin()
    error = (problem.model.network(grid)[:, 0] - exact).square().sum() / exact.square().sum()
    assert problem.evaluate(problem.heldout).loss == pytest.approx(error.item(), rel=1e-6)


def test_its_jacobian_takes_few_backward_passes(problem: Problem) -> None:
    some = problem.train.take(slice(0, 60))
    J = ResidualJacobian(problem.closure(some), problem.model)
    assert J.shape == (60, problem.size)
    assert J.backward_passes == 3
    assert J.explicit == ()
    gradient = torch.autograd.grad(problem.closure(some)(), problem.parameters)
    torch.testing.assert_close(J.T @ J.residuals, torch.cat([g.flatten() for g in gradient]))


@pytest.mark.parametrize("kind", [INTERIOR, INITIAL, BOUNDARY])
def test_rows_of_one_kind(problem: Problem, kind: int) -> None:
    rows = problem.train.inputs[problem.train.inputs[:, 0] == kind][:5]
    mixed = problem.model(problem.train.inputs)[problem.train.inputs[:, 0] == kind][:5]
    torch.testing.assert_close(problem.model(Batch(rows, rows).inputs), mixed)


def test_random_points_fill_the_same_domain() -> None:
    train = get_task("convection-random").build(0).train.inputs
    interior = train[train[:, 0] == INTERIOR, 2:] / torch.tensor([2 * math.pi, 1.0])
    assert len(interior) == 2000
    assert 0 <= float(interior.min()) < 1e-2 < 0.99 < float(interior.max()) <= 1
    # Of 2,000 cells of equal size independent points leave 1/e empty, a Sobol sequence far fewer.
    cells = (interior * torch.tensor([50, 40])).long() @ torch.tensor([40, 1])
    assert 0.33 < 1 - len(cells.unique()) / 2000 < 0.41
