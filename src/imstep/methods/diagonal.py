"""Diagonals of curvature with fixed rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from imstep.optim.diagonal_newton import DiagonalNewton
from imstep.optim.diagonal_rules import AdaHessianRule, DiagonalRule, HessianScaledMomentum, SophiaG


def adahessian(
    params: Iterable[Any], rule: AdaHessianRule | None = None, lr: float | Tensor = 0.15, seed: int = 0, **options: Any
) -> DiagonalNewton:
    """AdaHessian: Adam with the Hessian's diagonal, by random signs, in the place of squared gradients.

    Args:
        params: parameters or parameter groups.
        rule: its numbers.
        lr: a fixed rate, or one that a scheduler sets.
        seed: of the signs.
        **options: of :class:`~imstep.optim.DiagonalNewton`.

    Cost: a gradient's record and a Hessian product a step.

    Source: Yao et al., AAAI 2021, arXiv 2006.00719.
    """
    return DiagonalNewton(params, rule or AdaHessianRule(), lr=lr, seed=seed, **options)


def hessian_momentum(
    params: Iterable[Any], rule: DiagonalRule | None = None, lr: float | Tensor = 0.1, seed: int = 0, **options: Any
) -> DiagonalNewton:
    """Momentum with a rate for each parameter, the Hessian's diagonal in the denominator.

    Args:
        params: parameters or parameter groups.
        rule: its numbers; see :class:`~imstep.optim.HessianScaledMomentum`.
        lr: a fixed rate, or one that a scheduler sets; the default is our choice.
        seed: of the signs.
        **options: of :class:`~imstep.optim.DiagonalNewton`.

    Cost: a gradient a step; every tenth step a Hessian product more.

    Source: LeCun, Bottou, Orr and Müller, Efficient BackProp (1998), section 9.1.
    """
    return DiagonalNewton(params, rule or HessianScaledMomentum(), lr=lr, seed=seed, **options)


def sophia(
    params: Iterable[Any], rule: DiagonalRule | None = None, lr: float | Tensor = 1e-3, seed: int = 0, **options: Any
) -> DiagonalNewton:
    """Sophia: momentum over the Gauss-Newton matrix' diagonal, every entry clipped.

    Args:
        params: parameters or parameter groups.
        rule: ``SophiaG()``, the default, or ``SophiaH()`` for the Hessian's diagonal.
        lr: a fixed rate, or one that a scheduler sets; the default is our choice.
        seed: of sampled targets or probes.
        **options: of :class:`~imstep.optim.DiagonalNewton`.

    Cost: a gradient a step; every tenth step a backward pass more.

    Source: Liu et al., ICLR 2024, arXiv 2305.14342.
    """
    return DiagonalNewton(params, rule or SophiaG(), lr=lr, seed=seed, **options)
