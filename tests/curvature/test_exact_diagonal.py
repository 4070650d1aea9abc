"""The exact diagonal of a Gauss-Newton matrix, against the matrix written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal
from torch import Tensor, nn

import imstep
from imstep import spectral
from imstep.curvature import GaussNewtonDiagonal


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def conv() -> nn.Module:
    body = (nn.Conv2d(1, 2, 3), nn.Tanh(), nn.LayerNorm([2, 1, 1]), nn.Flatten(), nn.Linear(2, 2))
    return nn.Sequential(*body).double()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


CLASSES = torch.arange(12) % 2
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, Callable[[Any, Any], Tensor]]] = {
    "cross entropy": (mlp, normal(12, 3), CLASSES, F.cross_entropy),
    "squares": (mlp, normal(12, 3), normal(12, 3, seed=1), F.mse_loss),
    "not convex": (mlp, normal(12, 3), normal(12, 3, seed=1), lambda z, y: torch.cos(z - y).sum()),
    "convolution": (conv, normal(12, 1, 3, 3), CLASSES, F.cross_entropy),
    "batch normalisation": (normalised, normal(12, 3), CLASSES, F.cross_entropy),
    "sequences": (mlp, normal(4, 5, 3), normal(4, 5, 3, seed=1), F.mse_loss),
    "float32": (lambda: nn.Linear(3, 2), normal(12, 3).float(), CLASSES, F.cross_entropy),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_diagonal(case: str) -> None:
    make, x, y, loss = CASES[case]
    model = make()
    D = GaussNewtonDiagonal(lambda: (model(x), y), model, loss)
    G = imstep.GaussNewton(lambda: (model(x), y), model, loss)
    expected = G.to_dense().diag()
    torch.testing.assert_close(D.diagonal, expected, rtol=1e-10 if x.dtype is F64 else 1e-4, atol=1e-12)
    assert float(D.loss) == pytest.approx(float(G.loss))
    assert [t.shape for t in D.as_parameters(D.diagonal)] == [p.shape for p in model.parameters()]
    layers = spectral.trace(D, by="layer", rtol=1e-4)
    assert sum(own.value for own in layers.values()) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_dropout_is_drawn_once_and_buffers_move_once() -> None:
    body = (nn.Linear(3, 40), nn.Dropout(), nn.BatchNorm1d(40), nn.Linear(40, 1))
    model, x = nn.Sequential(*body).double(), normal(9, 3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        D, after = GaussNewtonDiagonal(lambda: (model(x), x[:, :1]), model), torch.rand(1)
        assert int(model[2].num_batches_tracked) == 1
        torch.manual_seed(1)
        G = imstep.GaussNewton(lambda: (model(x), x[:, :1]), model)
        assert after.equal(torch.rand(1))
    torch.testing.assert_close(D.diagonal, G.to_dense().diag(), rtol=1e-10, atol=1e-12)


COUPLED = {
    "weight decay": lambda z, y, p: F.mse_loss(z, y) + p.square().sum(),
    "between cases": lambda z, y, p: (z - y).sum().square(),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_a_loss_that_is_no_sum_over_cases_is_refused(kind: str) -> None:
    model, x = mlp(), normal(12, 3)
    with pytest.raises(ValueError, match=r"no sum over cases.*spectral\.diagonal"):
        GaussNewtonDiagonal(lambda: (model(x), x), model, lambda z, y: COUPLED[kind](z, y, model[0].weight))


def test_what_has_no_cases_or_too_many_outputs_is_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cases along its first dimension"):
        GaussNewtonDiagonal(lambda: (w.sum(), torch.zeros(())), [w])
    with pytest.raises(ValueError, match="too many for the exact diagonal"):
        GaussNewtonDiagonal(lambda: (w.sum() * torch.ones(1, 9000), torch.zeros(1, 9000)), [w])
