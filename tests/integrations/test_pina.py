"""PINA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pina = pytest.importorskip("pina")

from pina.model import FeedForward  # noqa: E402
from pina.optim import TorchScheduler  # noqa: E402
from pina.problem.zoo import Poisson2DSquareProblem  # noqa: E402
from pina.solver import PINN  # noqa: E402

import imstep  # noqa: E402
from imstep.integrations.lightning import StepMonitor  # noqa: E402
from imstep.integrations.pina import TorchOptimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_example(final_loss: Callable[[str], float]) -> None:
    """`PINN(optimizer=TorchOptimizer(imstep.LeastSquares))` with `imstep.integrations.pina.TorchOptimizer`"""
    assert final_loss("pina") < 1e-4


def test_labels_are_put_on_as_before() -> None:
    """tensors with labels are those that PINA makes"""
    TorchOptimizer(imstep.LeastSquares)
    x = torch.rand(3, 2, requires_grad=True)
    labelled = pina.LabelTensor(2 * x, ["a", "b"])
    assert type(labelled) is pina.LabelTensor
    assert labelled.labels == ["a", "b"]
    assert torch.equal(labelled.extract(["b"]).tensor, 2 * x[:, 1:])
    labelled.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert pina.LabelTensor([[1.0]], ["a"]).labels == ["a"]


@pytest.mark.parametrize("method", [imstep.LeastSquares, imstep.NewtonKrylov])
def test_problems_of_its_zoo(method: Any) -> None:
    """problems in two dimensions, schedules, `NewtonKrylov` in place of `LeastSquares`"""
    problem = Poisson2DSquareProblem()
    problem.discretise_domain(6, "grid")
    schedule = TorchScheduler(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    solver = PINN(
        problem, FeedForward(2, 1, layers=[10]), optimizer=TorchOptimizer(method), scheduler=schedule
    )
    trainer = pina.Trainer(
        solver,
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepMonitor()],
    )
    trainer.train()
    optimizer = solver.optimizer.instance
    assert optimizer.last_step.new_loss < optimizer.last_step.loss
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(optimizer.last_step.loss, rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_functions_that_make_an_optimizer() -> None:
    # PINA's own wrapper takes classes alone.
    model = FeedForward(1, 1, layers=[4])
    wrapped = TorchOptimizer(imstep.NewtonKrylov.for_batches, max_step_norm=2.0)
    wrapped.hook(model.parameters())
    expected = imstep.NewtonKrylov.for_batches(model.parameters(), max_step_norm=2.0)
    assert repr(wrapped.instance) == repr(expected)
    for nothing in (torch.nn.Linear, expected):
        with pytest.raises(ValueError, match="a Optimizer class was expected"):
            TorchOptimizer(nothing)
