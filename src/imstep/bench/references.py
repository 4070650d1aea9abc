"""Figures to hold beside those of trained networks: regressors of scikit-learn, fitted to a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imstep.bench.peers import seed_of
from imstep.runs.optimizers import OptimizerError
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import AnyBatch, Batch, Problem

__all__ = ["BOOSTING", "MLP", "Fitted"]


class Fitted(Stepper):
    """One step: a regressor is fitted to the batch; what is evaluated is the regressor in place of the model.

    Args:
        problem: a model of tables (k, n), with targets (k, 1).
        regressor: has `fit(inputs, targets)` and `predict(inputs)`.

    A step costs no gradient-equivalents, since there are none to count; its seconds are those of the fit.
    """

    def __init__(self, problem: Problem, regressor: Any) -> None:
        self._model, self._regressor, self._fitted = problem.model, regressor, False
        self._optimizer = torch.optim.SGD(problem.parameters, lr=0.0)  # which no one asks for a step

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        from threadpoolctl import threadpool_limits  # which comes with scikit-learn

        assert isinstance(batch, Batch)
        with threadpool_limits(1):  # as all have; torch's own limit does not reach scikit-learn
            self._regressor.fit(batch.inputs.numpy(), batch.targets[:, 0].numpy())
        self._fitted = True
        return StepResult(float("nan"), 0.0, converged=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if not self._fitted:
            yield
            return
        self._model.forward = self._predict
        try:
            yield
        finally:
            del self._model.forward

    def _predict(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(self._regressor.predict(inputs.numpy())).to(inputs)[:, None]


def _mlp(problem: Problem, options: Mapping[str, float]) -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(64, 64), alpha=options["weight_decay"], learning_rate_init=options["lr"], max_iter=500,
        early_stopping=True, n_iter_no_change=20, random_state=seed_of(problem),
    )  # fmt: skip


def _boosting(problem: Problem, options: Mapping[str, float]) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return HistGradientBoostingRegressor(
        learning_rate=options["lr"], l2_regularization=options["weight_decay"], early_stopping=True, max_iter=1000,
        n_iter_no_change=20, random_state=seed_of(problem),
    )  # fmt: skip


def _made(regressor: Callable[..., Any], problem: Problem, options: Mapping[str, float]) -> Stepper:
    try:
        return Fitted(problem, regressor(problem, options))
    except ImportError as error:
        raise OptimizerError("this figure is scikit-learn's. Install it: pip install 'imstep[tasks]'.") from error


MLP = OptimizerSpec(
    "sklearn-mlp", "scikit-learn's MLP", "Two layers of 64 ReLU units by Adam, stopped early.", partial(_made, _mlp),
    {"lr": 1e-3, "weight_decay": 1e-4},
)  # fmt: skip
BOOSTING = OptimizerSpec(
    "sklearn-boosting", "gradient boosting", "scikit-learn's histograms of gradients, stopped early.",
    partial(_made, _boosting), {"lr": 0.1, "weight_decay": 0.0},
)  # fmt: skip
