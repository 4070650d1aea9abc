"""Rivals that no command has by name: Muon with AdamW beside it, and methods of `imstep.methods` by their damping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from imstep import methods
from imstep.globalization import LevenbergMarquardt
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import GradientStepper, Stepper, StepwiseStepper
from imstep.tasks import Problem

__all__ = ["HESSIAN_FREE", "KFAC", "MUON", "MuonAndAdamW"]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for weights of two and more dimensions, flattened behind the first; AdamW for the rest.

    Both have one rate: Muon's steps are scaled to the size of AdamW's.

    Args:
        params: the parameters.
        lr: the rate of both, > 0.
        weight_decay: of both, >= 0, apart from the loss.

    Source: Jordan et al. 2024, who flatten filters; Liu et al. 2025 (arXiv 2502.16982) for the scale.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        params = list(params)
        super().__init__(params, {})
        # torch's Muon takes matrices only: they are views of the same storage, and so are their gradients.
        self._matrices = [(p, nn.Parameter(p.detach().flatten(1))) for p in params if p.ndim > 1]
        rest, views = [p for p in params if p.ndim < 2], [view for _, view in self._matrices]
        self._parts: list[torch.optim.Optimizer] = []
        if views:
            scale = "match_rms_adamw"
            self._parts.append(torch.optim.Muon(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn=scale))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay))
        self._params = params
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters themselves."""
        for p in self._params:
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of both."""
        for p, view in self._matrices:
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self._parts:
            part.step()


def _muon(problem: Problem, options: Mapping[str, float]) -> Stepper:
    return GradientStepper(MuonAndAdamW(problem.parameters, options["lr"], options["weight_decay"]))


def _damped(
    method: Callable[..., Any], factor: float, problem: Problem, options: Mapping[str, float]
) -> Stepper:
    damping = LevenbergMarquardt(initial=options["damping"], factor=factor)
    return StepwiseStepper(method(problem.parameters, damping=damping, weight_decay=options["weight_decay"]))


MUON = OptimizerSpec(
    "muon", "Muon", "torch's Muon for weights, AdamW for the rest.", _muon, {"lr": 1e-3, "weight_decay": 0.0}
)
KFAC = OptimizerSpec(
    "kfac", "K-FAC alone (imstep.methods)", "Steps of Kronecker factors, rescaled by the exact model.",
    partial(_damped, methods.kfac, 1.2), {"damping": 1.0, "weight_decay": 0.0},
)  # fmt: skip
HESSIAN_FREE = OptimizerSpec(
    "hessian-free", "Hessian-free (imstep.methods)", "Martens 2010.",
    partial(_damped, methods.hessian_free, 1.5), {"damping": 1e-2, "weight_decay": 0.0},
)  # fmt: skip
