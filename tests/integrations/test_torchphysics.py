"""TorchPhysics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

tp = pytest.importorskip("torchphysics")

import pytorch_lightning as lightning  # noqa: E402

import imstep  # noqa: E402
from imstep.integrations.lightning import StepMonitor  # noqa: E402


def test_example(final_loss: Callable[[str], float]) -> None:
    """`tp.OptimizerSetting(imstep.LeastSquares, lr=1.0)`"""
    assert final_loss("torchphysics") < 1e-5


@pytest.mark.parametrize("method", [imstep.LeastSquares, imstep.NewtonKrylov])
def test_inverse_problem(method: type[torch.optim.Optimizer]) -> None:
    """`NewtonKrylov` in place of `LeastSquares`, coefficients to be found, weights of conditions, data, options"""
    torch.set_default_dtype(torch.float64)
    X, U = tp.spaces.R1("x"), tp.spaces.R1("u")
    model = tp.models.FCN(input_space=X, output_space=U, hidden=(12,))
    rate = tp.models.Parameter(init=0.5, space=tp.spaces.R1("k"))
    x = torch.linspace(0, 2, 40)[:, None]
    points = tp.spaces.Points(x, X), tp.spaces.Points((-1.3 * x).exp(), U)
    loader = tp.utils.PointsDataLoader(points, batch_size=40)
    sampler = tp.samplers.RandomUniformSampler(tp.domains.Interval(X, 0, 2), n_points=50)
    equation = tp.conditions.PINNCondition(
        model, sampler, lambda u, x, k: tp.utils.grad(u, x) + k * u, parameter=rate, weight=0.5
    )
    data = tp.conditions.DataCondition(module=model, dataloader=loader, norm=2, use_full_dataset=True)
    setting = tp.OptimizerSetting(method, lr=1.0, optimizer_args={"weight_decay": 0.0})
    trainer = lightning.Trainer(
        max_steps=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(tp.solver.Solver([equation, data], optimizer_setting=setting))
    assert float(rate.as_tensor) == pytest.approx(1.3, abs=0.05)
    assert math.isfinite(trainer.callback_metrics["train/loss"].item())


def test_the_monitor_in_a_trainer_of_lightnings_other_package() -> None:
    # TorchPhysics trains by pytorch_lightning, whose strategies are none of `lightning`, where both are installed.
    X, U = tp.spaces.R1("x"), tp.spaces.R1("u")
    model = tp.models.FCN(input_space=X, output_space=U, hidden=(8,))
    sampler = tp.samplers.GridSampler(tp.domains.Interval(X, 0, 2), n_points=20)
    condition = tp.conditions.PINNCondition(model, sampler, lambda u, x: tp.utils.grad(u, x) + u - 1)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[StepMonitor()],
    )
    trainer.fit(tp.solver.Solver([condition], optimizer_setting=tp.OptimizerSetting(imstep.LeastSquares, lr=1.0)))
    (optimizer,) = trainer.optimizers
    assert trainer.callback_metrics["step/new_loss"].item() == pytest.approx(optimizer.last_step.new_loss)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(optimizer.last_step.loss, rel=1e-5)
