"""skorch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

skorch = pytest.importorskip("skorch")

from skorch.callbacks import GradientNormClipping, LRScheduler  # noqa: E402

import imstep  # noqa: E402

X = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
Y = np.sin(4 * X)


class Net(nn.Module):
    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Any) -> Any:
        return self.net(x)


def regressor(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"lr": 1.0, "max_epochs": 3, **options}
    return skorch.NeuralNetRegressor(
        Net, optimizer=imstep.NewtonKrylov, batch_size=-1, train_split=None, verbose=0, **options
    )


def losses(net: Any) -> list[float]:
    return [float(loss) for loss in net.history[:, "train_loss"]]


def test_example(final_loss: Callable[[str], float]) -> None:
    """`NeuralNetRegressor(optimizer=imstep.NewtonKrylov, lr=1.0)`"""
    assert final_loss("skorch") < 1e-3


def test_the_loss_is_the_one_before_the_step() -> None:
    """steps and losses equal those of a plain loop"""
    net = regressor().fit(X, Y)
    torch.manual_seed(0)
    model = Net()
    optimizer = imstep.NewtonKrylov(model.parameters())
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    expected = [float(optimizer.step(lambda: nn.functional.mse_loss(model(x), y))) for _ in range(3)]
    assert losses(net) == pytest.approx(expected, rel=1e-5)


def test_schedules() -> None:
    """`LRScheduler`"""
    net = regressor(callbacks=[LRScheduler("StepLR", step_size=1, gamma=0.5)]).fit(X, Y)
    assert net.optimizer_.param_groups[0]["lr"] < 1


def test_saving(tmp_path: Path) -> None:
    """`save_params(f_optimizer=...)`, pickles and `partial_fit` continue as if uninterrupted"""
    whole = regressor(max_epochs=5).fit(X, Y)
    net = regressor().fit(X, Y)
    copy = pickle.loads(pickle.dumps(net))
    files = {"f_params": str(tmp_path / "params"), "f_optimizer": str(tmp_path / "optimizer")}
    net.save_params(**files)
    loaded = regressor().initialize()
    loaded.load_params(**files)
    for again in (copy, loaded):
        again.set_params(max_epochs=2)
        again.partial_fit(X, Y)
        assert losses(again)[-1] == pytest.approx(losses(whole)[-1], rel=1e-4)


def test_searches() -> None:
    """`GridSearchCV` over options of the optimizer"""
    from sklearn.model_selection import GridSearchCV

    grid = {"optimizer__max_trials": [1, 12]}
    found = GridSearchCV(regressor(max_epochs=1), grid, cv=2).fit(X, Y)
    assert found.best_params_["optimizer__max_trials"] in (1, 12)


def test_options_set_too_late_are_refused() -> None:
    """`set_params(optimizer__lr=...)` acts at once; options that cannot are refused at the next step"""
    net = regressor().fit(X, Y)
    net.set_params(optimizer__lr=0.5)
    assert net.optimizer_.param_groups[0]["lr"] == 0.5
    net.set_params(optimizer__max_trials=3)
    with pytest.raises(ValueError, match="max_trials"):
        net.partial_fit(X, Y)


def test_clipping_is_refused() -> None:
    """refused: `GradientNormClipping`"""
    with pytest.raises(ValueError, match="clipping"):
        regressor(callbacks=[GradientNormClipping(1e-3)]).fit(X, Y)
