"""What is usual for long-range recurrent problems in place of curvature: other initial weights, another cell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from imstep.bench.peers import clipped_adam, seed_of
from imstep.runs.optimizers import OptimizerError
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import Stepper
from imstep.tasks import Problem

__all__ = ["LSTM", "ORTHOGONAL"]


def _layer(problem: Problem) -> nn.RNN:
    layer = getattr(problem.model, "layer", None)
    if not isinstance(layer, nn.RNN):
        raise OptimizerError(
            f"{problem.task} has no recurrent tanh layer to be begun otherwise: this contestant is for the long-range "
            "problems of `imstep tasks`. Leave it out."
        )
    return layer


def _orthogonal(problem: Problem, options: Mapping[str, float]) -> Stepper:
    layer = _layer(problem)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(problem))
        _recurrent(layer).copy_(nn.init.orthogonal_(torch.empty(layer.hidden_size, layer.hidden_size)))
    return clipped_adam(problem, options)


def _lstm(problem: Problem, options: Mapping[str, float]) -> Stepper:
    old = _layer(problem)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(problem))
        layer = nn.LSTM(old.input_size, old.hidden_size, batch_first=True)
        gates = dict(layer.named_parameters())["bias_hh_l0"]
        gates[old.hidden_size : 2 * old.hidden_size] = 1  # those that forget, forget nothing at first
    problem.model.layer = layer.to(_recurrent(old))
    return clipped_adam(problem, options)


def _recurrent(layer: nn.RNN) -> Tensor:
    return dict(layer.named_parameters())["weight_hh_l0"]


ORTHOGONAL = OptimizerSpec(
    "adam-orthogonal", "Adam, clipped, orthogonal", "Recurrent weights begin orthogonal; gradients clipped to 1.",
    _orthogonal, {"lr": 1e-3},
)  # fmt: skip
LSTM = OptimizerSpec(
    "lstm-adam", "LSTM by Adam, clipped", "An LSTM of as many units in place of tanh units.", _lstm, {"lr": 1e-3}
)
