"""Scimba."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

dtype = torch.get_default_dtype()
scimba_torch = pytest.importorskip("scimba_torch")

import imstep  # noqa: E402
from imstep.integrations.scimba import ScimbaLeastSquares, ScimbaNewtonKrylov  # noqa: E402

torch.set_default_dtype(dtype)  # importing Scimba changes both, for all other tests as well
torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _double(_as_it_was: None) -> None:
    torch.set_default_dtype(torch.float64)


def test_example(final_loss: Callable[[str], float]) -> None:
    """`OptimizerData({"class": ScimbaLeastSquares})`"""
    assert final_loss("scimba") < 1e-6


@pytest.mark.parametrize("kind", [ScimbaLeastSquares, ScimbaNewtonKrylov])
def test_steps_schedules_and_states(kind: Any) -> None:
    """options, schedules and the best state, which Scimba saves; steps equal those of a plain loop"""
    from scimba_torch.optimizers.optimizers_data import OptimizerData

    x = torch.linspace(0, math.pi, 20, dtype=torch.float64)[:, None]
    method = imstep.LeastSquares if kind is ScimbaLeastSquares else imstep.NewtonKrylov

    def net() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    model, twin = net(), net()
    data = OptimizerData(
        {
            "class": kind,
            "optimizer_args": {"max_trials": 9},
            "scheduler": torch.optim.lr_scheduler.StepLR,
            "scheduler_args": {"step_size": 2, "gamma": 0.5},
        }
    )
    data.activate_first_optimizer(list(model.parameters()))

    def closure() -> float:
        data.zero_grad()
        loss = (model(x) - x.sin()).square().mean()
        loss.backward(retain_graph=True)
        return loss.item()

    plain = method(twin.parameters(), max_trials=9)
    for _ in range(2):
        data.step(closure)
        plain.step(lambda: (twin(x) - x.sin()).square().mean())
    (optimizer,) = data.activated_optimizer
    assert isinstance(optimizer, method)
    assert optimizer.last_step.new_loss == pytest.approx(plain.last_step.new_loss, rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.update_best_optimizer()
    again = kind(list(model.parameters()), scheduler=torch.optim.lr_scheduler.StepLR, scheduler_args={"step_size": 2})
    again.load(optimizer.dict_for_save())
    assert again.cost == optimizer.cost
