"""DeepXDE."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("DDE_BACKEND", "pytorch")
dde = pytest.importorskip("deepxde")

import imstep  # noqa: E402


def model(optimizer: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """u'' = -sin x, compiled and not trained."""
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)
    geometry = dde.geometry.Interval(0, math.pi)
    ends = dde.icbc.DirichletBC(geometry, lambda x: 0, lambda x, on_boundary: on_boundary)
    equation = lambda x, u: dde.grad.hessian(u, x) + torch.sin(x)
    data = dde.data.PDE(geometry, equation, ends, num_domain=32, num_boundary=2)
    net = dde.nn.FNN([1, 10, 1], "tanh", "Glorot uniform")
    made, found = optimizer(net.parameters()), dde.Model(data, net)
    found.compile(made, verbose=0, **options)
    return found, made


def loss_of(model: Any) -> float:
    return float(sum(model.losshistory.loss_train[-1]))


def test_example(final_loss: Callable[[str], float]) -> None:
    """`model.compile(imstep.LeastSquares(net.parameters()))`"""
    assert final_loss("deepxde") < 1e-8


@pytest.mark.parametrize("method", [imstep.LeastSquares, imstep.NewtonKrylov])
def test_decay_and_weights(method: Callable[..., Any]) -> None:
    """a schedule by `decay=`, weights of losses by `loss_weights=`, `NewtonKrylov` in place of `LeastSquares`"""
    found, optimizer = model(method, decay=("step", 2, 0.5), loss_weights=[1, 100])
    found.train(iterations=5, display_every=5, verbose=0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    first, last = (float(sum(losses)) for losses in found.losshistory.loss_train)
    assert last < first


def test_the_step_is_that_of_the_formula() -> None:
    """a step equals one taken outside of DeepXDE"""
    found, optimizer = model(imstep.LeastSquares)
    twin, other = model(imstep.LeastSquares)
    found.train(iterations=1, display_every=1, verbose=0)
    x = torch.as_tensor(twin.data.train_x_all).requires_grad_()
    bc = torch.as_tensor(twin.data.train_x_bc)

    def closure() -> torch.Tensor:
        slope = torch.autograd.grad(twin.net(x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        return (second + torch.sin(x)).square().mean() + twin.net(bc).square().mean()

    other.step(closure)
    assert other.last_step.loss == pytest.approx(optimizer.last_step.loss, rel=1e-12)
    assert other.last_step.new_loss == pytest.approx(optimizer.last_step.new_loss, rel=1e-6)


def test_save_and_restore(tmp_path: Path) -> None:
    """`model.save` and `model.restore` continue as if uninterrupted"""
    found, _ = model(imstep.LeastSquares)
    found.train(iterations=3, display_every=3, verbose=0)
    path = found.save(str(tmp_path / "model"))
    found.train(iterations=2, display_every=2, verbose=0)
    again, _ = model(imstep.LeastSquares)
    again.train(iterations=2, display_every=2, verbose=0, model_restore_path=path)
    assert loss_of(again) == pytest.approx(loss_of(found), rel=1e-9)


def test_points_drawn_anew() -> None:
    """`dde.callbacks.PDEPointResampler`"""
    found, optimizer = model(imstep.LeastSquares)
    found.train(iterations=6, display_every=6, verbose=0, callbacks=[dde.callbacks.PDEPointResampler(period=2)])
    assert optimizer.last_step.accepted
    assert loss_of(found) < float(sum(found.losshistory.loss_train[0]))
