"""PyTorch-Ignite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ignite = pytest.importorskip("ignite")

from ignite.engine import create_supervised_trainer as theirs  # noqa: E402
from ignite.handlers import Checkpoint, PiecewiseLinear  # noqa: E402

import imstep  # noqa: E402
from imstep.integrations.ignite import create_supervised_trainer  # noqa: E402

X = torch.linspace(-1, 1, 32)[:, None]
BATCHES = [(X, (4 * X).sin())]


def made(create: Callable[..., Any] = create_supervised_trainer, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
    optimizer = imstep.NewtonKrylov(model.parameters())
    return create(model, optimizer, nn.MSELoss(), **options), model, optimizer


def test_example(final_loss: Callable[[str], float]) -> None:
    """`imstep.integrations.ignite.create_supervised_trainer`"""
    assert final_loss("ignite") < 1e-3


def test_the_output_is_of_the_point_before_the_step() -> None:
    """`output_transform` gets prediction and loss before the step"""
    trainer, model, optimizer = made(output_transform=lambda x, y, prediction, loss: (prediction, loss))
    expected = model(X)
    prediction, loss = trainer.run(BATCHES, max_epochs=1).output
    assert torch.equal(prediction, expected)
    assert float(loss) == pytest.approx(optimizer.last_step.loss)


def test_schedules_and_checkpoints(tmp_path: Path) -> None:
    """`PiecewiseLinear` and other schedules, `Checkpoint`"""
    trainer, model, optimizer = made()
    trainer.add_event_handler(
        ignite.engine.Events.ITERATION_STARTED, PiecewiseLinear(optimizer, "lr", [(0, 1.0), (2, 0.5)])
    )
    trainer.run(BATCHES, max_epochs=3)
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    _, twin, other = made()
    Checkpoint.load_objects({"model": twin, "optimizer": other}, checkpoint=torch.load(tmp_path / "saved.pt"))
    closure = lambda net: (lambda: nn.functional.mse_loss(net(X), BATCHES[0][1]))
    assert float(other.step(closure(twin))) == float(optimizer.step(closure(model)))
    assert other.last_step.new_loss == optimizer.last_step.new_loss


def test_the_factory_of_ignite() -> None:
    """ignite's own factory: error that says what to do"""
    trainer, _, _ = made(theirs)
    with pytest.raises(TypeError, match=r"imstep\.integrations"):
        trainer.run(BATCHES, max_epochs=1)
