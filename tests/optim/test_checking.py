"""The loss at other points beside that at the points of the steps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from optim_cases import F64
from torch import Tensor, nn

from imstep import LeastSquares, pde
from imstep.optim import OverfittingWarning, StepOutcome

ELSEWHERE = torch.linspace(0, 3, 40, dtype=F64)[:, None]


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).to(F64)


def at(u: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """u' = 3 cos 3x, u(0) = 0: mean square at points, and at the start."""
    start = torch.zeros(1, 1, dtype=F64)

    def loss() -> Tensor:
        return (pde.gradient(u, x)[..., 0] - 3 * (3 * x).cos()).square().mean() + u(start).square().mean()

    return loss


def points(count: int, generator: torch.Generator) -> Tensor:
    return 3 * torch.rand(count, 1, generator=generator, dtype=F64)


def test_points_that_stay_are_fitted_alone_and_it_says_so_once() -> None:
    u, x = network(), points(8, torch.Generator().manual_seed(0))
    optimizer = LeastSquares(u.parameters())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(25):
            optimizer.step(at(u, x), check=at(u, ELSEWHERE))
    assert [w.category for w in given] == [OverfittingWarning]
    assert "may be wrong between them" in str(given[0].message)
    assert given[0].filename == __file__
    assert optimizer.last_step.new_loss < 1e-4 < 1e-1 < optimizer.last_step.new_check_loss


@pytest.mark.parametrize(("count", "warned"), [(6, True), (30, False)])
def test_too_few_points_are_warned_of_though_they_are_redrawn(count: int, warned: bool) -> None:
    u, generator = network(), torch.Generator().manual_seed(4)
    optimizer = LeastSquares(u.parameters())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for step in range(60):
            if step == 25:  # what was found so far is not lost
                saved, optimizer = optimizer.state_dict(), LeastSquares(u.parameters())
                optimizer.load_state_dict(saved)
            optimizer.step(at(u, points(count, generator)))
    assert [w.category for w in given] == [OverfittingWarning] * warned
    if warned:
        assert "too few for 49 parameters" in str(given[0].message)
        assert given[0].filename == __file__


def test_a_problem_that_is_solved_has_points_enough() -> None:
    """Though each step fits its own alone: the error falls all the same, and then residuals are rounding."""
    w, generator = nn.Parameter(torch.zeros(5, dtype=F64)), torch.Generator().manual_seed(0)
    exact, optimizer = torch.arange(5, dtype=F64), LeastSquares([w])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            x = torch.randn(2, 5, generator=generator, dtype=F64)
            optimizer.step(lambda: (x @ (w - exact)).square().sum())  # noqa: B023
    assert (w - exact).norm() < 1e-12


def test_points_that_are_redrawn_are_not_warned_of() -> None:
    u, generator = network(), torch.Generator().manual_seed(0)
    optimizer, other = LeastSquares(u.parameters()), torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            optimizer.step(at(u, points(30, generator)), check=at(u, points(30, other)))
    assert optimizer.last_step.new_check_loss < 1e-2


def test_record_and_cost() -> None:
    u, x = network(), points(30, torch.Generator().manual_seed(0))
    twin = copy.deepcopy(u)
    optimizer, plain = LeastSquares(u.parameters()), LeastSquares(twin.parameters())
    for number in range(3):
        before = float(at(u, ELSEWHERE)().detach())
        optimizer.step(at(u, x), check=at(u, ELSEWHERE))
        plain.step(at(twin, x))
        step, after = optimizer.last_step, float(at(u, ELSEWHERE)().detach())
        assert (step.check_loss, step.new_check_loss) == (before, after)
        expected = math.log(before / after) / math.log(step.loss / step.new_loss)
        assert step.generalisation == pytest.approx(expected)
        assert step.cost.losses == plain.last_step.cost.losses + (2 if number == 0 else 1)
        assert math.isnan(plain.last_step.generalisation)
    assert optimizer.cost.losses == plain.cost.losses + 4
    both = (torch.cat([p.flatten() for p in net.parameters()]) for net in (u, twin))
    assert torch.equal(*both)  # a check changes no step


def test_what_stays_is_not_evaluated_again_and_what_was_moved_is() -> None:
    u = network()
    optimizer = LeastSquares(u.parameters(), lr=0.0)
    calls = []
    check = lambda: calls.append(1) or at(u, ELSEWHERE)()
    for _ in range(3):
        optimizer.step(at(u, ELSEWHERE[::2]), check=check)
    assert len(calls) == 1
    with torch.no_grad():
        u[0].weight.mul_(2)
    optimizer.step(at(u, ELSEWHERE[::2]), check=check)
    assert len(calls) == 2


def test_resumes_with_what_it_has_found() -> None:
    u, x = network(), points(8, torch.Generator().manual_seed(0))
    optimizer = LeastSquares(u.parameters())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(25):
            optimizer.step(at(u, x), check=at(u, ELSEWHERE))
            state = optimizer.state_dict()
            optimizer = LeastSquares(u.parameters())
            optimizer.load_state_dict(state)
    assert [w.category for w in given] == [OverfittingWarning]


@pytest.mark.parametrize("kind", ["number", "backward", "list"])
def test_kinds_of_checks(kind: str) -> None:
    u, x = network(), points(30, torch.Generator().manual_seed(0))

    def backward() -> None:
        at(u, ELSEWHERE)().backward()

    checks = {"number": lambda: at(u, ELSEWHERE)().item(), "backward": backward, "list": [at(u, ELSEWHERE)]}
    optimizer = LeastSquares(u.parameters())
    optimizer.step(at(u, x), check=checks[kind])
    assert optimizer.last_step.new_check_loss == pytest.approx(float(at(u, ELSEWHERE)().detach()))
    gradient = torch.cat([p.grad.flatten() for p in u.parameters()])
    assert float(gradient.norm()) == pytest.approx(optimizer.last_step.gradient_norm)  # nothing was added to it


def test_a_check_that_draws_its_points_itself_draws_others_than_the_closure() -> None:
    u, drawn = network(), []

    def loss() -> Tensor:
        x = 3 * torch.rand(20, 1).to(F64)
        drawn.append(x)
        return at(u, x)()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = LeastSquares(u.parameters())
        optimizer.step(loss, check=loss)
        first = [x.clone() for x in drawn]
        optimizer.step(loss, check=loss)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[-1])
    assert all(torch.equal(x, first[1]) for x in first[1:-1])


def test_a_check_leaves_buffers_and_has_no_part_in_a_refused_step() -> None:
    norm = nn.BatchNorm1d(1).to(F64)
    u, x = network(), points(8, torch.Generator().manual_seed(0))
    optimizer = LeastSquares(u.parameters())
    optimizer.step(at(u, x), check=lambda: norm(u(ELSEWHERE)).square().mean())
    assert int(norm.num_batches_tracked) == 0
    assert not bool(norm.running_mean.any())
    before = optimizer.last_step.new_check_loss
    optimizer.step(lambda: at(u, x)() * math.nan, check=at(u, ELSEWHERE))
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert optimizer.last_step.new_check_loss == before


def test_what_is_no_check_is_refused() -> None:
    u = network()
    with pytest.raises(TypeError, match="check must be a closure that returns the loss at other points"):
        LeastSquares(u.parameters()).step(at(u, ELSEWHERE), check=at(u, ELSEWHERE)())
