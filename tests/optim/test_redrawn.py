"""Steps at points that are drawn anew each time, which remember those of earlier steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import Tensor, nn

from imstep.globalization import ContractionDamping
from imstep.optim import Box, ColumnNorms, EarlierDraws, LeastSquares

ALL = EarlierDraws(rows=1000)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)


def fit(model: nn.Module, step: int, count: int = 6) -> Callable[[], Tensor]:
    x = normal(count, 3, seed=step)
    return lambda: F.mse_loss(model(x), x.prod(1, keepdim=True))


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def linearised(model: nn.Module, step: int, count: int = 6) -> tuple[Tensor, Tensor]:
    """ρ and J by autograd, with f = ρᵀρ/2."""
    x = normal(count, 3, seed=step)
    sizes = [p.numel() for p in model.parameters()]

    def residuals(w: Tensor) -> Tensor:
        named = zip(dict(model.named_parameters()), model.parameters(), w.split(sizes), strict=True)
        output = torch.func.functional_call(model, {name: part.view(p.shape) for name, p, part in named}, (x,))
        return (2 / count) ** 0.5 * (output - x.prod(1, keepdim=True))[:, 0]

    w = flat(model)
    return residuals(w), torch.func.jacrev(residuals)(w)


@pytest.mark.parametrize("recall", [EarlierDraws(0.5, rows=12), EarlierDraws(0.7, rows=100)], ids=str)
def test_steps_are_those_of_dense_algebra(recall: EarlierDraws) -> None:
    """The second has more rows than parameters in the end, of which a triangle is kept."""
    model = network()
    options = {"share": 0.0, "corrections": 1, "damping": ContractionDamping(initial=1.0)}
    optimizer, rows = LeastSquares(model.parameters(), recall=recall, **options), []
    for step in range(9):
        w, (residuals, J) = flat(model), linearised(model, step)
        start = float(optimizer.step(fit(model, step)))
        record = optimizer.last_step
        kept = rows[: 2 if recall.rows == 12 else None]
        weighted = [recall.decay ** (j + 1) * other.T @ other for j, other in enumerate(kept)]
        G = sum(weighted, torch.zeros(len(w), len(w), dtype=F64))
        d = -torch.linalg.solve(J.T @ J + G + record.damping * torch.eye(len(w), dtype=F64), J.T @ residuals)
        torch.testing.assert_close(flat(model) - w, d, rtol=1e-6, atol=1e-9)
        assert record.new_loss == pytest.approx(float(fit(model, step)().detach()))
        assert record.actual_decrease == pytest.approx(start - record.new_loss)
        assert record.curvature == pytest.approx(float((J @ d).square().sum()))
        assert record.predicted_decrease == pytest.approx(float(-(J.T @ residuals) @ d - (J @ d).square().sum() / 2))
        if step > 0:  # of the first step it is not known whether its points are new
            rows.insert(0, J)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_linear_equation_is_solved_once_all_rows_were_met(dtype: torch.dtype) -> None:
    """5 of 30 conditions a step, of which the first are forgotten; minimum-norm steps alone are far off after seven."""
    solution, ends = normal(30).to(dtype), {}
    for recall in (None, ALL):
        w = nn.Parameter(torch.zeros(30, dtype=dtype))
        optimizer = LeastSquares([w], recall=recall, damping=ContractionDamping(initial=1e-10))
        for step in range(7):
            A = normal(5, 30, seed=step + 1).to(dtype)
            optimizer.step(lambda A=A, w=w: F.mse_loss(A @ w, A @ solution))
        ends[recall] = float((w.detach() - solution).norm() / solution.norm())
    assert ends[None] > 0.1
    assert ends[ALL] < (1e-6 if dtype is F64 else 1e-2)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"weight_decay": 1e-3, "lr": 0.5}], ids=str)
def test_points_that_stay_are_told_and_nothing_is_recalled(options: dict[str, Any]) -> None:
    ends = []
    for recall in (None, ALL):
        model = network()
        optimizer = LeastSquares(model.parameters(), recall=recall, **options)
        for _ in range(4):
            optimizer.step(fit(model, 0))
        ends.append(flat(model))
    assert torch.equal(*ends)


OTHERS: list[dict[str, Any]] = [
    {"momentum": 0.3, "lr": 0.5},
    {"weight_decay": 1e-3, "max_step_norm": 0.1},
    {"scaling": ColumnNorms()},
    {"box": Box(torch.full((41,), -0.6, dtype=F64), torch.full((41,), 0.6, dtype=F64))},
]


@pytest.mark.parametrize("options", OTHERS, ids=["momentum, rate", "decay, bound", "scaled", "box"])
def test_other_options_and_resumes(options: dict[str, Any]) -> None:
    model = network()
    twin = copy.deepcopy(model)
    first = LeastSquares(model.parameters(), recall=EarlierDraws(), **options)
    second = LeastSquares(twin.parameters(), recall=EarlierDraws(), **options)
    for step in range(6):
        first.step(fit(model, step))
        if step == 3:
            state = copy.deepcopy(second.state_dict())
            second = LeastSquares(twin.parameters(), recall=EarlierDraws(), **options)
            second.load_state_dict(state)
        second.step(fit(twin, step))
        record = first.last_step
        assert record.new_loss - record.new_penalty == pytest.approx(float(fit(model, step)().detach()))
        assert record.new_loss <= record.loss
    assert torch.equal(flat(model), flat(twin))
    assert first._memory.earlier.is_contiguous()  # as it is loaded: products round by the layout


def test_parameters_that_are_frozen_later_forget() -> None:
    model = network()
    optimizer = LeastSquares(model.parameters(), recall=ALL)
    optimizer.step(fit(model, 0))
    model[0].weight.requires_grad_(False)
    optimizer.step(fit(model, 1))
    optimizer.step(fit(model, 2))
    assert optimizer.last_step.accepted


@pytest.mark.parametrize(("decay", "rows"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.5, 0)])
def test_options_out_of_range(decay: float, rows: int) -> None:
    with pytest.raises(ValueError, match=r"lies in|at least 1"):
        EarlierDraws(decay, rows)


def test_an_option_of_another_kind() -> None:
    with pytest.raises(TypeError, match="recall must be EarlierDraws"):
        LeastSquares(network().parameters(), recall=3)  # type: ignore[arg-type]
