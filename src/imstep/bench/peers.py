"""Rivals that no command has by name: Muon with AdamW beside it, Adam with clipped gradients and before L-BFGS, and
methods of `imstep.methods` by their damping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from imstep import methods
from imstep.globalization import LevenbergMarquardt
from imstep.runs.optimizers import OPTIMIZERS
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import GradientStepper, Stepper, StepResult, StepwiseStepper
from imstep.tasks import AnyBatch, Problem

__all__ = [
    "ADAM_CLIPPED", "ADAM_LBFGS", "HESSIAN_FREE", "KFAC", "MUON", "AdamThenLBFGS", "MuonAndAdamW", "clipped_adam",
    "seed_of",
]  # fmt: skip

LONGEST = 1.0
"""Norm to which gradients are clipped, as is usual for recurrent networks (Pascanu et al. 2013)."""


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


class AdamThenLBFGS(Stepper):
    """Adam for the first steps, then torch's L-BFGS from where it came to.

    Args:
        problem: whose parameters are trained.
        lr: Adam's rate.
        first: steps of Adam.
    """

    def __init__(self, problem: Problem, lr: float, first: float) -> None:
        self._adam = GradientStepper(torch.optim.Adam(problem.parameters, lr=lr))
        self._lbfgs = OPTIMIZERS["lbfgs"].create(problem)
        self._left = first

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return (self._adam if self._left > 0 else self._lbfgs).optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        self._left -= 1
        return (self._adam if self._left >= 0 else self._lbfgs).step(problem, batch)


class _ClippedAdam(torch.optim.Adam):
    """Adam with gradients no longer than 1."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], LONGEST)
        return super().step(closure)


def seed_of(problem: Problem) -> int:
    """A number that follows from the initial weights, which follow from the run's seed."""
    return int(sum(p.detach().double().abs().sum() for p in problem.parameters) * 1e6) % 2**32


def clipped_adam(problem: Problem, options: Mapping[str, float]) -> Stepper:
    """Adam with clipped gradients, of the option `lr`."""
    return GradientStepper(_ClippedAdam(problem.parameters, lr=options["lr"]))


def _muon(problem: Problem, options: Mapping[str, float]) -> Stepper:
    return GradientStepper(MuonAndAdamW(problem.parameters, options["lr"], options["weight_decay"]))


def _damped(
    method: Callable[..., Any], factor: float, problem: Problem, options: Mapping[str, float]
) -> Stepper:
    damping = LevenbergMarquardt(initial=options["damping"], factor=factor)
    optimizer = method(problem.parameters, damping=damping, weight_decay=options["weight_decay"])
    return StepwiseStepper(optimizer, structural=options["structural"])


MUON = OptimizerSpec(
    "muon", "Muon", "torch's Muon for weights, AdamW for the rest.", _muon, {"lr": 1e-3, "weight_decay": 0.0}
)
KFAC = OptimizerSpec(
    "kfac", "K-FAC alone (imstep.methods)", "Steps of Kronecker factors, rescaled by the exact model.",
    partial(_damped, methods.kfac, 1.2), {"damping": 1.0, "weight_decay": 0.0, "structural": 0.0},
)  # fmt: skip
HESSIAN_FREE = OptimizerSpec(
    "hessian-free", "Hessian-free (imstep.methods)", "Martens 2010.",
    partial(_damped, methods.hessian_free, 1.5), {"damping": 1e-2, "weight_decay": 0.0, "structural": 0.0},
)  # fmt: skip
ADAM_LBFGS = OptimizerSpec(
    "adam-lbfgs", "Adam, then L-BFGS", "Some steps of Adam, then torch's L-BFGS with the strong Wolfe search.",
    lambda problem, options: AdamThenLBFGS(problem, options["lr"], options["first"]), {"lr": 3e-3, "first": 300.0},
)  # fmt: skip
ADAM_CLIPPED = OptimizerSpec(
    "adam-clipped", "Adam, clipped", "Adam with gradients clipped to a norm of 1.", clipped_adam, {"lr": 1e-3}
)
