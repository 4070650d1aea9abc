"""Methods of `imstep.methods` as optimizers that can be named, and what they refuse before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.methods.settings import CONTESTANTS, settings
from imstep import methods
from imstep.runs.contestants import contestants
from imstep.runs.optimizers import METHODS, OPTIMIZERS, OptimizerError, get_optimizer
from imstep.runs.studies import ComparisonRequest, run_comparison
from imstep.runs.suitability import rehearse
from imstep.tasks import Batch, ExampleProblem


def problem(loss: Callable[..., torch.Tensor] | None = None, width: int = 5) -> ExampleProblem:
    generator = torch.Generator().manual_seed(0)
    batch = Batch(*torch.randn(2, 20, 3, generator=generator, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double()
    return ExampleProblem("small", model, batch, batch, loss or nn.MSELoss())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_named_and_steps(name: str) -> None:
    small = problem()
    before = small.evaluate(small.train).loss
    spec = get_optimizer(name)
    stepper = spec.create(small, **({"lr": spec.learning_rates[0]} if spec.learning_rates else {}))
    for _ in range(3):
        result = stepper.step(small, small.train)
    assert result.loss < before
    assert result.cost >= 1


def test_every_method_is_there_under_a_name_of_its_own() -> None:
    assert len(METHODS) == len(methods.__all__)
    assert not METHODS.keys() & OPTIMIZERS.keys()
    assert get_optimizer("natural_gradient") is get_optimizer("natural-gradient")
    assert get_optimizer("lbfgs").title == "L-BFGS"  # torch's, as ever
    with pytest.raises(OptimizerError, match="Did you mean 'newton-cg'"):
        get_optimizer("newtoncg")


def test_options_of_a_method_reach_it() -> None:
    small = problem()
    made = get_optimizer("imstep-lbfgs").create(small, pairs=3.0, exact=1.0, weight_decay=0.5).optimizer
    assert "LimitedMemoryBFGS(pairs=3, exact=True)" in repr(made)
    assert made.defaults["weight_decay"] == 0.5
    assert "momentum" not in get_optimizer("kfac").defaults
    sophia = get_optimizer("sophia").create(small, lr=0.5, max_step_norm=1e-3)
    sophia.step(small, small.train)
    assert sophia.optimizer.last_step.step_norm == pytest.approx(1e-3)


def test_methods_with_rates_are_swept_and_stochastic_ones_get_batches() -> None:
    rates = get_optimizer("sophia").learning_rates
    assert rates == (1e-4, 3e-4, 1e-3, 3e-3)
    assert [c.batch_size for c in contestants(["newton_cg", "sophia"], minibatch=7)] == [None, None, 7]


def bounded(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that is no convex function of the outputs."""
    return (outputs - targets).square().mean().sin()


@pytest.mark.parametrize(
    ("name", "small", "message"),
    [
        ("newton", problem(width=600), "newton does not suit small: .* there are 4,203 parameters"),
        ("bfgs", problem(width=600), "bfgs refuses .*4,203 parameters"),
        ("sophia", problem(bounded), "sophia does not suit small: .*convex"),
    ],
)
def test_what_does_not_suit_is_refused_at_the_first_step(name: str, small: ExampleProblem, message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        rehearse(get_optimizer(name), small, None)


def test_a_comparison_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    request = ComparisonRequest("digits-mlp", ["newton-cg", "newton"], budget=5.0, examples=20)
    with pytest.raises(OptimizerError, match="newton does not suit digits-mlp"):
        run_comparison(request, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_comparison_of_all_methods_has_settings_for_each(name: str) -> None:
    small = problem()
    assert len(settings(name)) == 3
    assert all(make(small).optimizer.param_groups for make in settings(name).values())
