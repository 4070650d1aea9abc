"""Equations as tasks: their solutions satisfy their conditions; points are functions of seed and step."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

import imstep
from imstep.runs.optimizers import get_optimizer
from imstep.tasks import TASKS, Condition, PhysicsTask, TaskError, get_task
from imstep.tasks.equations.burgers import burgers_solution
from imstep.tasks.equations.cavity import CENTRELINES, cavity_flow
from imstep.tasks.equations.heat import HeatWithConductivity
from imstep.tasks.equations.phase_field import allen_cahn_solution

F64 = torch.float64
PI = math.pi
EQUATIONS = [name for name, task in TASKS.items() if isinstance(task, PhysicsTask)]


def _reaction(x: Tensor) -> Tensor:
    h = torch.exp(-((x[:, :1] - PI) ** 2) * 8 / PI**2)
    return h / (h + (1 - h) * torch.exp(-5 * x[:, 1:]))


def _string(x: Tensor) -> Tensor:
    standing = [a * torch.sin(n * PI * x[:, :1]) * torch.cos(2 * n * PI * x[:, 1:]) for a, n in ((1, 1), (0.5, 5))]
    return standing[0] + standing[1]


CLOSED_FORMS = {
    "poisson-2d": lambda x: torch.sin(PI * x[:, :1]) * torch.sin(PI * x[:, 1:]),
    "poisson-5d": lambda x: torch.cos(PI * x).sum(1, keepdim=True),
    "poisson-5d-wide": lambda x: torch.cos(PI * x).sum(1, keepdim=True),
    "poisson-10d": lambda x: torch.stack([x[:, i] * x[:, i + 1] for i in range(0, 10, 2)]).sum(0)[:, None],
    "heat-1d": lambda x: torch.exp(-(PI**2) * x[:, 1:] / 4) * torch.sin(PI * x[:, :1]),
    "convection": lambda x: torch.sin(x[:, :1] - 30 * x[:, 1:]),
    "convection-40": lambda x: torch.sin(x[:, :1] - 40 * x[:, 1:]),
    "convection-80": lambda x: torch.sin(x[:, :1] - 80 * x[:, 1:]),
    "reaction": _reaction,
    "wave": _string,
}


class Exact(nn.Module):
    def __init__(self, solution) -> None:
        super().__init__()
        self.solution, self.unused = solution, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.solution(x)


def loss_of(task: PhysicsTask, solution) -> dict[str, float]:
    """Root mean squares of what a solution misses, by condition."""
    batch = task.build(0, dtype=F64).train
    field = Exact(solution)
    pairs = zip(task.conditions, batch.of, strict=True)
    return {c.name: float(c.residual(field, x).detach().square().mean().sqrt()) for c, x in pairs}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_solution_misses_nothing_and_is_the_reference(name: str) -> None:
    task = get_task(name)
    assert max(loss_of(task, CLOSED_FORMS[name]).values()) < 1e-10
    wrong = loss_of(task, lambda x: CLOSED_FORMS[name](x) + 0.1 * x[:, :1] ** 2)
    assert max(wrong.values()) > 1e-2
    reference = task.reference()
    torch.testing.assert_close(reference.values, CLOSED_FORMS[name](reference.points), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["burgers", "burgers-smooth"])
def test_the_solution_of_burgers_equation(name: str) -> None:
    viscosity = {"burgers": 0.01 / PI, "burgers-smooth": 0.01}[name]
    x = torch.tensor([[-0.6, 0.2], [0.3, 0.45], [0.1, 0.3], [-0.97, 0.8]], dtype=F64)
    h = 2e-3
    step = lambda a, b: burgers_solution(x + torch.tensor([a * h, b * h], dtype=F64), viscosity)
    u = step(0, 0)
    slope = (8 * (step(1, 0) - step(-1, 0)) - (step(2, 0) - step(-2, 0))) / (12 * h)
    rate = (8 * (step(0, 1) - step(0, -1)) - (step(0, 2) - step(0, -2))) / (12 * h)
    bend = (16 * (step(1, 0) + step(-1, 0)) - 30 * u - (step(2, 0) + step(-2, 0))) / (12 * h * h)
    assert (rate + u * slope - viscosity * bend).abs().max() < 1e-5 * rate.abs().max()
    start = torch.tensor([[0.3, 0.0], [-0.8, 0.0]], dtype=F64)
    torch.testing.assert_close(burgers_solution(start, viscosity), -torch.sin(PI * start[:, :1]))
    points = get_task(name).reference().points[::97]
    torch.testing.assert_close(burgers_solution(points, viscosity), _by_hermite(points, viscosity), rtol=0, atol=1e-6)


def _by_hermite(points: Tensor, viscosity: float) -> Tensor:
    """Cole and Hopf's integrals by Gauss and Hermite's rule, as in the literature."""
    eta, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(200))
    y = points[:, :1] - 2 * (viscosity * points[:, 1:]).sqrt() * eta
    exponent = -torch.cos(PI * y) / (2 * PI * viscosity)
    density = weights * (exponent - exponent.amax(1, keepdim=True)).exp()
    return -(torch.sin(PI * y) * density).sum(1, keepdim=True) / density.sum(1, keepdim=True)


def test_the_spectral_solution_of_the_allen_cahn_equation() -> None:
    u = allen_cahn_solution()
    assert u.shape == (101, 512)
    assert (u[::10] - allen_cahn_solution(1024, 500)[::10]).abs().max() < 1e-7
    rate = (8 * (u[51] - u[49]) - (u[52] - u[48])) / (12 / 100)
    frequency = 1j * PI * torch.fft.rfftfreq(512, 1 / 512, dtype=F64)
    bend = torch.fft.irfft(frequency**2 * torch.fft.rfft(u[50]), 512)
    assert (rate - 1e-4 * bend - 5 * (u[50] - u[50] ** 3)).abs().max() < 1e-4


def test_measured_temperatures_are_data_and_equations_see_the_conductivity() -> None:
    problem = get_task("heat-inverse").build(0, dtype=F64)
    first, second = (next(problem.batches(epoch)) for epoch in (0, 1))
    assert torch.equal(first.of[2], second.of[2])
    assert not torch.equal(first.of[0], second.of[0])
    model = problem.model
    assert isinstance(model, HeatWithConductivity)
    equation, x = problem.conditions[0], first.of[0]
    slower = equation.residual(model, x).detach()
    with torch.no_grad():
        model.log_conductivity += math.log(2)
    faster = equation.residual(model, x).detach()
    with torch.no_grad():
        model.log_conductivity += math.log(2)
    torch.testing.assert_close(equation.residual(model, x).detach() - faster, 2 * (faster - slower))


def test_the_flow_in_a_cavity_is_the_published_one() -> None:
    """Ghia, Ghia and Shin's values; and the extremes of Botella and Peyret (Comput. Fluids 27, 1998, p. 421)."""
    flow = get_task("cavity").reference().values.numpy().reshape(33, 33, 2)
    u, v = (CubicSpline(np.linspace(0, 1, 33), values) for values in (flow[:, 16, 0], flow[16, :, 1]))
    for name, found in (("u", u), ("v", v)):
        at, published = np.array(CENTRELINES[name]).T
        assert abs(found(at) - published).max() < 1e-2
    fine = np.linspace(0, 1, 1001)
    extremes = u(fine).min(), v(fine).max(), v(fine).min()
    np.testing.assert_allclose(extremes, (-0.2140424, 0.1795728, -0.2538030), atol=1e-3)
    slow = cavity_flow(16, reynolds=0.0)
    np.testing.assert_allclose(slow[..., 0], slow[:, ::-1, 0], atol=1e-12)  # creeping flow is symmetric


def test_the_equations_of_the_cavity() -> None:
    """At the flow of Kovasznay, which satisfies them, and at another."""
    equations = get_task("cavity").conditions[0].residual
    rate = 50 - math.sqrt(50**2 + 4 * PI**2)
    x = torch.rand(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def kovasznay(x: Tensor) -> Tensor:
        grown, angle = torch.exp(rate * x[:, 0]), 2 * PI * x[:, 1]
        flow = 1 - grown * torch.cos(angle), rate / (2 * PI) * grown * torch.sin(angle), -(grown**2) / 2
        return torch.stack(flow, 1)

    assert equations(kovasznay, x).abs().max() < 1e-12
    linear = lambda x: torch.stack([x[:, 1], 2 * x[:, 0], 3 * x[:, 0] * x[:, 1]], 1)  # (u·∇)u = (v, 2u)
    expected = torch.stack([2 * x[:, 0] + 3 * x[:, 1], 2 * x[:, 1] + 3 * x[:, 0], 0 * x[:, 0]], 1)
    torch.testing.assert_close(equations(linear, x), expected)
    walls = get_task("cavity").conditions[1].residual
    edge = torch.tensor([[0.5, 1.0], [0.25, 1.0], [0.0, 0.5], [0.5, 0.0]], dtype=F64)
    torch.testing.assert_close(walls(lambda x: 0 * x, edge)[:, 0], torch.tensor([-1.0, -0.75, 0.0, 0.0], dtype=F64))


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_depend_on_seed_and_step_alone(name: str) -> None:
    problem = get_task(name).build(0, examples=60)
    draws = [next(problem.batches(epoch, seed=seed)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    torch.manual_seed(7)
    again = next(problem.batches(0, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(draws[0].of, again.of, strict=True))
    assert all(not torch.equal(a.of[0], b.of[0]) for a, b in pairwise([*draws, problem.train]))
    for condition, points in zip(problem.conditions, again.of, strict=True):
        assert len(points) == condition.count
        assert condition.residual(problem.model, points).shape[:-1] == (len(points),)
    assert problem.evaluate(problem.heldout).loss > 0
    assert problem.evaluate(problem.train).loss == pytest.approx(problem.closure(problem.train)().item(), rel=1e-5)
    with pytest.raises(TaskError, match="points a step"):
        problem.batch_count(20)


def test_points_by_residuals_leave_the_loss_what_it_is() -> None:
    """In expectation, beside a mean over 20,000 points; in processes that share a batch; and the model as it was."""
    problem = get_task("burgers").build(0, dtype=F64, examples=120)
    problem.model.train()
    draws = [problem.drawn(epoch, 0, 120) for epoch in range(8)]
    assert problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())
    condition, of_equation = problem.conditions[0], [draw.pairs[0] for draw in draws]
    assert all(float(w.mean()) == pytest.approx(1) and float(w.std()) > 0.1 for _, w in of_equation)
    means = torch.stack([condition.loss(problem.model, *pair).detach() for pair in of_equation])
    everywhere = condition.draw(20_000, torch.Generator().manual_seed(0))
    exact = float(condition.residual(problem.model, everywhere).detach().square().mean())
    assert abs(float(means.mean()) - exact) < 4 * float(means.std()) / math.sqrt(len(means)) + 0.02 * exact
    assert float(means.std()) < 0.1 * exact
    shared = torch.stack([problem.share(draws[0], rank, 3)() for rank in range(3)])
    torch.testing.assert_close(shared.sum(), problem.closure(draws[0])())
    assert draws[0].weights[1:] == (None, None)


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_is_trained_by_least_squares(name: str) -> None:
    problem = get_task(name).build(0, dtype=F64, examples=90)
    optimizer = imstep.LeastSquares(problem.parameters)
    before = problem.evaluate(problem.train).loss
    for epoch in range(3):
        optimizer.step(problem.closure(next(problem.batches(epoch))))
    assert problem.evaluate(problem.train).loss < before


@pytest.mark.parametrize("redrawn", [True, False])
def test_training_at_points_that_stay_is_checked_at_others(redrawn: bool) -> None:
    problem = dataclasses.replace(get_task("heat-1d"), redrawn=redrawn).build(0, dtype=F64, examples=40)
    stepper = get_optimizer("least-squares").create(problem, recall=0.5, balance=1)
    record = stepper.step(problem, next(problem.batches(0))).record
    assert len(record["weights"]) == len(problem.conditions)
    with pytest.raises(ValueError, match="balance is 0 for none"):
        get_optimizer("least-squares").create(problem, balance=0.5)
    if redrawn:
        assert problem.elsewhere is None
        assert math.isnan(record["new_check_loss"])
    else:
        assert record["new_check_loss"] == pytest.approx(problem.evaluate(problem.other).loss)
        assert not torch.equal(problem.other.of[0], problem.train.of[0])


def test_a_task_begins_with_fewer_points() -> None:
    problem = get_task("poisson-2d").build(0, examples=60)
    assert problem.growing() is None
    few = problem.beginning_with(12)
    points = few.growing()
    assert points is not None
    assert points.count == 12
    assert len(few.drawn(3, seed=1, count=12)) == 12
    whole = next(problem.batches(3, seed=1))
    drawn = few.drawn(3, seed=1, count=len(whole))
    assert all(torch.equal(a, b) for a, b in zip(whole.of, drawn.of, strict=True))
    burgers = dataclasses.replace(get_task("burgers-smooth"), reference=None)  # which takes seconds
    for examples, first in ((None, 1075), (60, 15), (1, 1)):
        assert burgers.build(0, examples=examples).growing().count == first
    assert dataclasses.replace(burgers, redrawn=False).build(0).growing() is None
    with pytest.raises(TaskError, match="keeps its points"):
        dataclasses.replace(problem, redrawn=False).beginning_with(12)


def test_a_task_ends_with_more_points() -> None:
    """Than its conditions say, where steps hold at their own points only."""
    task = get_task("poisson-10d")
    points = task.build(0).growing()
    assert points is not None
    assert points.count == len(next(task.build(0).batches(0))) == 150
    for _ in range(20):
        points.observe_losses(1.0, 1e-3)
    assert points.count == 2400
    assert len(task.build(0).drawn(0, 0, points.count)) == 2400
    smaller = task.build(0, examples=15)
    assert smaller.beginning_with(240).growing() is not None
    with pytest.raises(TaskError, match="1 to 240 points"):
        smaller.beginning_with(241)


@pytest.mark.parametrize(("name", "balance", "weights"), [("wave", -1, 4), ("wave", 0, 0), ("heat-1d", -1, 0)])
def test_a_task_has_its_conditions_weighed(name: str, balance: float, weights: int) -> None:
    """Unless the optimizer is told otherwise."""
    problem = get_task(name).build(0, dtype=F64, examples=40)
    stepper = get_optimizer("least-squares").create(problem, balance=balance)
    assert len(stepper.step(problem, next(problem.batches(0))).record["weights"]) == weights


def test_surfaces_show_solution_and_network() -> None:
    solution, found = get_task("convection").build(0).surfaces()
    assert len(solution.values) == len(found.values) == 101
    assert len(solution.values[0]) == 201
    assert solution.extent == ((0.0, 2 * PI), (0.0, 1.0))
    assert solution.values[100][50] == pytest.approx(math.sin(PI / 2 - 30))
    assert get_task("poisson-5d").build(0).surfaces() is None


def test_a_condition_checks_its_numbers() -> None:
    with pytest.raises(TaskError, match="positive weight"):
        Condition("edge", lambda u, x: u(x), lambda count, generator: torch.zeros(count, 1), 3, weight=0.0)
