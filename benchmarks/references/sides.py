"""Methods of imstep beside the same ones in packages of other hands: how far the results differ.

Each function takes both through the same few steps, in float64, and returns the largest difference of the parameters
relative to the length of the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor, nn

from imstep import methods
from imstep.globalization import AdaptiveCubic, FixedStep, NoDamping, TrustRegion
from imstep.linalg import (
    AbsoluteEigenvalues,
    DiagonalOperator,
    LimitedMemoryPreconditioner,
    RankOneOperator,
    bfgs_update,
    sr1_update,
)
from imstep.optim import (
    AdaHessianRule,
    Direct,
    Dogleg,
    GeneralizedLanczos,
    ResidualForcing,
    Shampoo,
    SophiaH,
    SteihaugToint,
)

F64 = torch.float64
PLAIN: dict[str, Any] = {"step": FixedStep(), "damping": NoDamping()}
ACCURATE = ResidualForcing(eta=1e-13, power=1e-9)
SOLVED: dict[str, Any] = {**PLAIN, "forcing": ACCURATE}

Weights = list[nn.Parameter]
Loss = Callable[[], Tensor]
Make = Callable[[Weights], Callable[[Loss], Any]]
"""From parameters to a function that takes a step on a closure."""
X = torch.linspace(-1, 2, 6, dtype=F64)


# --- what is minimised --------------------------------------------------------------------------------------------


def classification() -> tuple[Weights, Loss]:
    """A strictly convex loss: logistic regression with a penalty."""
    X, generator = _normal(60, 5), torch.Generator().manual_seed(1)
    y = (X @ torch.randn(5, 3, generator=generator, dtype=F64)).argmax(1)
    weights = [nn.Parameter(torch.zeros(3, 5, dtype=F64)), nn.Parameter(torch.zeros(3, dtype=F64))]
    penalty = lambda: 0.05 * sum(w.square().sum() for w in weights)
    return weights, lambda: F.cross_entropy(F.linear(X, *weights), y) + penalty()


def network() -> tuple[Weights, Loss]:
    """A Hessian with eigenvalues of both signs: a layer of tanh units fitted to a wave."""
    X = torch.linspace(-1, 1, 30, dtype=F64)[:, None]
    weights = [nn.Parameter(w) for w in (_normal(4, 1), _normal(4, seed=1), _normal(1, 4, seed=2))]
    output = lambda: torch.tanh(F.linear(X, weights[0], weights[1])) @ weights[2].mT
    return weights, lambda: (output() - torch.sin(3 * X)).square().mean()


def separable() -> tuple[Weights, Loss]:
    """A diagonal Hessian, which random signs know exactly."""
    weights, scale = [nn.Parameter(_normal(4, 3))], _normal(4, 3, seed=1).exp()
    return weights, lambda: (scale * weights[0].square() + weights[0] ** 4 / 4).sum()


def square() -> tuple[Weights, Loss]:
    """Gradients that are square matrices of full rank."""
    weights, A, B = [nn.Parameter(_normal(4, 4))], _normal(4, 4, seed=1), _normal(4, 4, seed=2)
    return weights, lambda: (A @ weights[0] - B).square().sum()


def regression() -> tuple[Weights, Loss]:
    """A linear model of as many examples as parameters; the closure returns the squared error of each example."""
    X, y = _normal(4, 4), _normal(4, seed=1)
    weights = [nn.Parameter(torch.zeros(4, dtype=F64))]
    return weights, lambda: (X @ weights[0] - y).square()


def curve() -> tuple[Weights, Loss]:
    """Residuals of an exponential; the closure returns them."""
    x = torch.linspace(0, 1, 12, dtype=F64)
    weights = [nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=F64))]
    return weights, lambda: weights[0][0] * torch.exp(weights[0][1] * x) + weights[0][2] - torch.cos(2 * x)


# --- pairs --------------------------------------------------------------------------------------------------------


def newton() -> float:
    ours = _ours(methods.newton, **PLAIN)
    return _differ(classification, ours, _torchzero(lambda m: m.Newton()))


def newton_cg() -> float:
    ours = _ours(methods.newton_cg, **SOLVED)
    return _differ(classification, ours, _torchzero(lambda m: m.NewtonCG(tol=1e-13, reg=0)))


def absolute_newton() -> float:
    ours = _ours(methods.newton, AbsoluteEigenvalues(), **PLAIN)
    return _differ(network, ours, _torchzero(lambda m: m.Newton(eigval_fn=torch.abs)), steps=2)


def saddle_free_newton() -> float:
    ours = _ours(methods.saddle_free_newton, dimension=12, **SOLVED)
    return _differ(network, ours, _torchzero(lambda m: m.Newton(eigval_fn=torch.abs)), steps=2)


def gauss_newton() -> float:
    ours = _ours(methods.gauss_newton, solver=Direct(), **PLAIN)
    return _differ(curve, ours, _torchzero(lambda m: m.GaussNewton(reg=0)), ours_of=_squares)


def trust_region_exact() -> float:
    return _first_step_differs("trust-krylov", {"inexact": False}, solver=Direct())


def trust_region_lanczos() -> float:
    return _first_step_differs("trust-krylov", {"inexact": False}, solver=GeneralizedLanczos())


def trust_region_steihaug() -> float:
    return _first_step_differs("trust-ncg", solver=SteihaugToint())


def trust_region_dogleg() -> float:
    return _first_step_differs("dogleg", problem=classification, solver=Dogleg())


def steihaug_of_torchzero() -> float:
    ours = _ours(methods.trust_region, solver=SteihaugToint(), step=TrustRegion(radius=0.3), forcing=ACCURATE)
    return _differ(network, ours, _torchzero(lambda m: m.TrustCG(m.Newton(), init=0.3, prefer_exact=False)), steps=1)


def cubic_regularization() -> float:
    ours = _ours(methods.cubic_regularization, step=AdaptiveCubic(sigma=2.0), forcing=ACCURATE)
    theirs = _torchzero(lambda m: m.CubicRegularization(m.Newton(), init=0.5, eps=1e-13, maxiter=200))
    return _differ(network, ours, theirs, steps=1)


def natural_gradient() -> float:
    ours = _ours(methods.natural_gradient, "empirical", solver=Direct(), **PLAIN)
    return _differ(regression, ours, _torchzero(lambda m: m.NaturalGradient(reg=0)), ours_of=torch.mean)


def adahessian() -> float:
    rule = AdaHessianRule(spatial=False, eps=1e-16)
    return _differ(separable, _ours(methods.adahessian, rule, lr=0.1), _of("AdaHessian", lr=0.1, eps=1e-16))


def adahessian_of_torchzero() -> float:
    rule = AdaHessianRule(spatial=False, eps=1e-8)
    theirs = _torchzero(lambda m: m.AdaHessian(averaging=False, eps=1e-8), lr=0.1)
    return _differ(separable, _ours(methods.adahessian, rule, lr=0.1), theirs)


def sophia() -> float:
    rule = SophiaH(gamma=0.5, every=2)
    ours = _ours(methods.sophia, rule, lr=0.1 * 0.5)
    return _differ(separable, ours, _of("SophiaH", lr=0.1, p=0.5, update_period=2, hessian_distribution="rademacher"))


def shampoo() -> float:
    ours = _ours(methods.shampoo, lr=0.1, rule=Shampoo(sums=True, eps=1e-14, every=1), momentum=0.0)
    return _differ(square, ours, _of("Shampoo", lr=0.1, matrix_eps=1e-14, preconditioning_compute_steps=1))


def bfgs() -> float:
    """The inverse Hessian after five pairs, without line searches."""
    from torchzero.modules.quasi_newton.quasi_newton import bfgs_H_

    return _updates_differ(bfgs_update, lambda H, s, y: bfgs_H_(H, s, y, 0.0))


def sr1() -> float:
    from torchzero.modules.quasi_newton.quasi_newton import sr1_

    return _updates_differ(sr1_update, lambda H, s, y: sr1_(H, s, y, 1e-9))


def lbfgs() -> float:
    from torchzero.modules.quasi_newton.lbfgs import lbfgs_Hx

    pairs = _pairs()
    steps, changes = zip(*pairs, strict=True)
    s, y = pairs[-1]
    ours = LimitedMemoryPreconditioner(DiagonalOperator((s @ y / (y @ y)).expand(len(s))), pairs)
    return _relative(ours @ X, lbfgs_Hx(X, steps, changes, [s @ y for s, y in pairs]))


def lsr1() -> float:
    from torchzero.modules.quasi_newton.lsr1 import lsr1_Bx

    steps, changes = zip(*_pairs(), strict=True)
    return _relative(RankOneOperator(_pairs(), gamma=1.0) @ X, lsr1_Bx(X, steps, changes))


def halley() -> float:
    """On a function of one variable, SciPy's iteration on its derivative."""
    w = nn.Parameter(torch.tensor([0.8], dtype=F64))
    step = methods.halley([w], step=FixedStep(), forcing=ACCURATE).step
    for _ in range(2):
        step(lambda: (torch.exp(w) - 2 * torch.sin(w) + w**2).sum())
    slope, second, third = (
        lambda x: np.exp(x) - 2 * np.cos(x) + 2 * x,
        lambda x: np.exp(x) + 2 * np.sin(x) + 2,
        lambda x: np.exp(x) + 2 * np.cos(x),
    )
    theirs = optimize.newton(slope, 0.8, second, fprime2=third, maxiter=2, tol=1e-300, disp=False)
    return abs(w.item() - theirs) / abs(theirs - 0.8)


# --- how --------------------------------------------------------------------------------------------------------


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _squares(residuals: Tensor) -> Tensor:
    return residuals.square().sum()


def _differ(
    problem: Callable[[], tuple[Weights, Loss]],
    ours: Make,
    theirs: Make,
    steps: int = 3,
    ours_of: Callable[[Tensor], Tensor] = torch.sum,
) -> float:
    """Both through some steps; ``ours_of`` makes a loss of what the problem's closure returns."""
    ends = []
    for make, of in ((ours, ours_of), (theirs, lambda value: value)):
        weights, closure = problem()
        start = torch.cat([w.detach().flatten().clone() for w in weights])
        step = make(weights)
        for _ in range(steps):
            step(lambda: of(closure()))  # noqa: B023
        ends.append(torch.cat([w.detach().flatten() for w in weights]) - start)
    return _relative(*ends)


def _first_step_differs(
    name: str,
    settings: Mapping[str, Any] | None = None,
    problem: Callable[[], tuple[Weights, Loss]] = network,
    **options: Any,
) -> float:
    """A trust region's first step, which its radius bounds, beside SciPy's."""
    weights, closure = problem()
    start = torch.cat([w.detach().flatten().clone() for w in weights])

    def at(x: Tensor) -> Tensor:
        parts = x.split([w.numel() for w in weights])
        replaced = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
        before, weights[:] = list(weights), replaced
        try:
            return closure()
        finally:
            weights[:] = before

    value, slope = torch.func.grad_and_value(at), torch.func.hessian(at)
    theirs = optimize.minimize(
        lambda x: float(value(torch.from_numpy(x))[1]),
        start.numpy(),
        jac=lambda x: value(torch.from_numpy(x))[0].numpy(),
        hess=lambda x: slope(torch.from_numpy(x)).numpy(),
        method=name,
        options={"initial_trust_radius": 0.3, "maxiter": 1, **(settings or {})},
    )
    methods.trust_region(weights, step=TrustRegion(radius=0.3), forcing=ACCURATE, **options).step(closure)
    end = torch.cat([w.detach().flatten() for w in weights])
    return _relative(end - start, torch.from_numpy(theirs.x) - start)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _ours(method: Callable[..., Any], *arguments: Any, **options: Any) -> Make:
    return lambda weights: method(weights, *arguments, **options).step


def _torchzero(module: Callable[[Any], Any], lr: float = 1.0) -> Make:
    """An optimizer of torchzero from one of its modules, made of their namespace."""

    def make(weights: Weights) -> Callable[[Loss], Any]:
        import torchzero as tz

        optimizer = tz.Optimizer(weights, module(tz.m), tz.m.LR(lr))

        def step(closure: Loss) -> None:
            def evaluated(backward: bool = True) -> Tensor:
                value = closure()
                if backward:
                    optimizer.zero_grad()
                    value.sum().backward()
                return value

            optimizer.step(evaluated)

        return step

    return make


def _of(name: str, **options: Any) -> Make:
    """An optimizer of pytorch_optimizer."""

    def make(weights: Weights) -> Callable[[Loss], Any]:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, name)(weights, **options)

        def step(closure: Loss) -> None:
            optimizer.zero_grad()
            closure().backward(create_graph=True)
            optimizer.step()

        return step

    return make


def _pairs() -> list[tuple[Tensor, Tensor]]:
    """Five steps, and what they change the gradient of a quadratic by."""
    A = _normal(6, 6, seed=3)
    A = A @ A.mT + torch.eye(6, dtype=F64)
    return [(s, A @ s) for s in _normal(5, 6, seed=4)]


def _updates_differ(
    ours: Callable[[Tensor, Tensor, Tensor], Tensor], theirs: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> float:
    mine, other = torch.eye(6, dtype=F64), torch.eye(6, dtype=F64)
    for s, y in _pairs():
        mine, other = ours(mine, s, y), theirs(other, s.clone(), y.clone())
    return _relative(mine, other)


@dataclass(frozen=True)
class Check:
    """A method of `imstep.methods` and what it is compared to.

    Attributes:
        method: its name, with what was chosen.
        package, other: the other one.
        tolerance: the largest difference that is no fault; more than rounding where the other one stops earlier.
        difference: takes both through their steps.
    """

    method: str
    package: str
    other: str
    difference: Callable[[], float]
    tolerance: float = 1e-10


CHECKS = (
    Check("newton", "torchzero", "Newton", newton),
    Check("newton_cg", "torchzero", "NewtonCG", newton_cg),
    Check("absolute_newton", "torchzero", "Newton, absolute eigenvalues", absolute_newton),
    Check("saddle_free_newton", "torchzero", "Newton, absolute eigenvalues", saddle_free_newton),
    Check("gauss_newton", "torchzero", "GaussNewton", gauss_newton),
    Check("trust_region(solver=Direct())", "SciPy", "trust-krylov", trust_region_exact, 1e-6),
    Check("trust_region()", "SciPy", "trust-krylov", trust_region_lanczos, 1e-6),
    Check("trust_region(solver=SteihaugToint())", "SciPy", "trust-ncg", trust_region_steihaug),
    Check("trust_region(solver=SteihaugToint())", "torchzero", "TrustCG", steihaug_of_torchzero),
    Check("trust_region(solver=Dogleg())", "SciPy", "dogleg", trust_region_dogleg),
    Check("cubic_regularization", "torchzero", "CubicRegularization", cubic_regularization),
    Check("natural_gradient, empirical", "torchzero", "NaturalGradient", natural_gradient),
    Check("adahessian", "pytorch_optimizer", "AdaHessian", adahessian),
    Check("adahessian", "torchzero", "AdaHessian", adahessian_of_torchzero),
    Check("sophia, SophiaH", "pytorch_optimizer", "SophiaH", sophia),
    Check("shampoo", "pytorch_optimizer", "Shampoo", shampoo),
    Check("bfgs", "torchzero", "BFGS", bfgs),
    Check("lbfgs", "torchzero", "LBFGS", lbfgs),
    Check("sr1", "torchzero", "SR1", sr1),
    Check("lsr1", "torchzero", "LSR1", lsr1),
    Check("halley", "SciPy", "optimize.newton", halley),
)
