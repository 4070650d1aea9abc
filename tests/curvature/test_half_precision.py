"""Least squares in half precision, and where values and derivatives part: rows against those in full precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep
from imstep.curvature import ResidualJacobian


def half_precision(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network, partly or wholly in half precision, and a loss of 70 residuals."""
    torch.manual_seed(0)
    x = torch.randn(70, 2)
    y = x[:, :1].sin() + x[:, 1:].square() / 4
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    if kind == "float32":
        return model, lambda: (model(x) - y).square().mean()
    if kind == "autocast":

        def closure() -> Tensor:
            with torch.autocast("cpu", dtype):
                outputs = model(x)
            return (outputs.float() - y).square().mean()

        return model, closure
    model.to(dtype)
    if kind == "parameters":
        return model, lambda: (model(x.to(dtype)).float() - y).square().mean()
    return model, lambda: F.mse_loss(model(x.to(dtype)), y.to(dtype))


@pytest.mark.filterwarnings("ignore:.*used in ways that are not recognised")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["autocast", "parameters", "loss"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Codes that tell rows apart stay within the range of float16."""
    exact, closure = half_precision("float32", dtype)
    expected = ResidualJacobian(closure, exact).written_out()
    model, closure = half_precision(kind, dtype)
    J = ResidualJacobian(closure, model)
    assert float((J.written_out() - expected).norm()) < 2 * torch.finfo(dtype).eps * float(expected.norm())
    optimizer = imstep.LeastSquares(model.parameters())
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < 0.2 * losses[0]


def test_straight_through_in_part_of_a_layer() -> None:
    """J is the derivative as autograd has it; trials are judged by the loss as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)

    def closure() -> Tensor:
        h = model[1](model[0](x))
        rounded = h[:, 3:] + ((8 * h[:, 3:]).round() / 8 - h[:, 3:]).detach()
        return F.mse_loss(model[2](torch.cat([h[:, :3], rounded], 1)), y)

    J = ResidualJacobian(closure, model)
    gradients = torch.autograd.grad(closure(), list(model.parameters()))
    torch.testing.assert_close(J.T @ J.residuals, torch.cat([g.reshape(-1) for g in gradients]))
    optimizer = imstep.LeastSquares(model.parameters())
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_blocks_of_products_with_batch_normalisation(kind: type[nn.Module], affine: bool, training: bool) -> None:
    """PyTorch's batched kernel takes one dtype, where inputs are of half precision and statistics are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), kind(4, affine=affine), nn.Tanh(), nn.Conv1d(4, 2, 2)).train(training)
    x = torch.randn(6, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        H = imstep.Hessian(lambda: model(x).square().mean(), model)
        J = imstep.Jacobian(lambda: model(x), model)
    for A in (H, J, J.T):
        V = torch.randn(A.shape[1], 3)
        one_by_one = torch.stack([A @ v for v in V.T], dim=1)
        assert (A @ V - one_by_one).norm() < 0.02 * one_by_one.norm()
