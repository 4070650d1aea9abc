"""Shampoo, SOAP and KL-Shampoo against plain transcriptions of their papers' formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, normal
from torch import Tensor, nn

from imstep import NewtonKrylov, methods
from imstep.curvature.parameters import ParameterVector
from imstep.optim import SOAP, KLShampoo, Kronecker, PreconditionedMomentum, Shampoo, StepOutcome
from imstep.optim.preconditioning import GradientFactors

A = normal(12, 12) @ normal(12, 12).T / 12 + torch.eye(12, dtype=F64)
B = normal(12, seed=1)
RULES: list[GradientFactors] = [Shampoo(), SOAP(), KLShampoo()]


def power(matrix: Tensor, exponent: float, eps: float) -> Tensor:
    floored = matrix + eps * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=F64)
    return torch.from_numpy(np.real(scipy.linalg.fractional_matrix_power(floored.numpy(), exponent)))


def quadratic(w: Tensor) -> Tensor:
    return w.reshape(-1) @ (A @ w.reshape(-1)) / 2 - B @ w.reshape(-1)


def gradient(w: Tensor) -> Tensor:
    return (A @ w.reshape(-1) - B).view_as(w)


def followed(
    optimizer: PreconditionedMomentum, w: nn.Parameter, direction: Callable[[int, Tensor], Callable], rtol: float = 1e-8
) -> None:
    """Steps of an optimizer beside w <- w - lr P m', with P by hand."""
    x, m = w.detach().clone(), torch.zeros_like(w)
    for t in range(8):
        g = gradient(x)
        m = 0.9 * m + 0.1 * g
        P = direction(t, g)
        x = x - 0.05 * (P(m / (1 - 0.9 ** (t + 1))) + 0.02 * x)
        optimizer.step(lambda: quadratic(w))
        torch.testing.assert_close(w.detach(), x, rtol=rtol, atol=rtol)


OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}


@pytest.mark.parametrize("sums", [True, False])
def test_shampoo_is_its_paper_s_algorithm(sums: bool) -> None:
    w, L, R = nn.Parameter(normal(4, 3, seed=2)), torch.zeros(4, 4, dtype=F64), torch.zeros(3, 3, dtype=F64)
    roots: list[Tensor] = []

    def direction(t: int, g: Tensor) -> Callable[[Tensor], Tensor]:
        nonlocal L, R, roots
        keep, share = (1.0, 1.0) if sums else (0.95, 0.05)
        L, R = keep * L + share * g @ g.T, keep * R + share * g.T @ g
        correction = 1.0 if sums else 1 - 0.95 ** (t + 1)
        if t < 3 or t % 3 == 0:
            roots = [power(side / correction, -0.25, 1e-2) for side in (L, R)]
        return lambda m: roots[0] @ m @ roots[1]

    followed(methods.shampoo([w], rule=Shampoo(sums=sums, every=3), **OPTIONS), w, direction)


def test_soap_is_its_paper_s_algorithm() -> None:
    w, L, R = nn.Parameter(normal(4, 3, seed=2)), torch.zeros(4, 4, dtype=F64), torch.zeros(3, 3, dtype=F64)
    U, v, Q = torch.eye(12, dtype=F64), torch.zeros(12, dtype=F64), []

    def follow(M: Tensor, q: Tensor | None) -> Tensor:
        """Algorithm 4, its columns in the order of their Rayleigh quotients."""
        if q is None:
            return torch.linalg.eigh(M)[1]
        return torch.linalg.qr(M @ q[:, (q.T @ M @ q).diagonal().argsort(descending=True)])[0]

    def direction(t: int, g: Tensor) -> Callable[[Tensor], Tensor]:
        nonlocal L, R, U, v, Q
        if t == 0:
            L, R = g @ g.T, g.T @ g
        if t < 3 or t % 3 == 0:
            Q = [follow(M, q) for M, q in zip((L, R), Q or (None, None), strict=True)]
            new = torch.kron(*Q)
            v, U = (new.T @ (U @ torch.diag(v) @ U.T) @ new).diagonal(), new
        v = 0.95 * v + 0.05 * (U.T @ g.reshape(-1)) ** 2
        corrected, now = v / (1 - 0.95 ** (t + 1)), U
        if t > 0:
            keep = 0.95 * (1 - 0.95**t) / (1 - 0.95 ** (t + 1))
            L, R = keep * L + (1 - keep) * g @ g.T, keep * R + (1 - keep) * g.T @ g
        scale = corrected.sqrt() + 1e-8 * corrected.mean().sqrt()
        return lambda m: (now @ ((now.T @ m.reshape(-1)) / scale)).view_as(m)

    followed(methods.soap([w], rule=SOAP(every=3), **OPTIONS), w, direction, 1e-6)


def test_kl_shampoo_is_its_paper_s_algorithm() -> None:
    w = nn.Parameter(normal(4, 3, seed=2))
    S: list[Tensor] = []

    def direction(t: int, g: Tensor) -> Callable[[Tensor], Tensor]:
        nonlocal S
        if t == 0:
            S = [g.square().mean().sqrt() * torch.eye(d, dtype=F64) for d in (4, 3)]
        a, b = (torch.linalg.inv(s + (1e-6 * s.trace() / len(s) if t else 0) * torch.eye(len(s), dtype=F64)) for s in S)
        S = [0.95 * S[0] + 0.05 * g @ b @ g.T / 3, 0.95 * S[1] + 0.05 * g.T @ a @ g / 4]
        roots = [power(s, -0.5, 1e-6) for s in S]
        return lambda m: roots[0] @ m @ roots[1]

    followed(methods.kl_shampoo([w], rule=KLShampoo(every=1), **OPTIONS), w, direction)


def test_kl_shampoo_finds_a_covariance_of_that_form() -> None:
    """Of gradients with covariance C_a ⊗ C_b it learns that, up to a factor that goes from one to the other."""
    Ca, Cb = (r @ r.T / 4 + torch.eye(len(r), dtype=F64) for r in (normal(4, 4), normal(3, 3, seed=1)))
    parameters = ParameterVector([nn.Parameter(torch.zeros(4, 3, dtype=F64))])
    preconditioner = KLShampoo(decay=0.995, every=20).make(parameters)
    La, Lb = torch.linalg.cholesky(Ca), torch.linalg.cholesky(Cb)
    for g in normal(800, 4, 3, seed=5):
        preconditioner.take((La @ g @ Lb.T).reshape(-1))
    P = preconditioner.operator(0.0).to_dense()
    expected = torch.kron(power(Ca, -0.5, 0.0), power(Cb, -0.5, 0.0))
    assert float((P - expected).norm() / expected.norm()) < 0.15


SHAPES = [(), (5,), (1, 4), (3, 2), (2, 3, 2, 2), (6, 2), (6,), (6, 7)]


@pytest.mark.parametrize("rule", [Shampoo(largest=5), SOAP(largest=5), KLShampoo(largest=5)])
def test_tensors_of_any_shape(rule: GradientFactors) -> None:
    """Wide sides have the identity; P is symmetric, definite, a block for each tensor, and without units."""
    parameters = ParameterVector([nn.Parameter(torch.zeros(shape, dtype=F64)) for shape in SHAPES])
    scaled = []
    for scale in (1.0, 2.0**-30):  # eigenvectors of few gradients are not unique, but their rounding is
        preconditioner = rule.make(parameters)
        for g in normal(6, parameters.size, seed=3):
            preconditioner.take(scale * g)
        scaled.append(preconditioner.operator(0.0).to_dense() * scale)
    P = scaled[0]
    torch.testing.assert_close(P, scaled[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(P, P.T)
    assert torch.linalg.eigvalsh(P)[0] > 0
    whole = torch.block_diag(*[torch.ones(n, n, dtype=F64) for n in parameters.sizes])
    assert not bool((P * (1 - whole)).any())
    start = sum(parameters.sizes[:5])
    one_sided = P[start : start + 12, start : start + 12]  # (6, 2): columns only, unless v tells entries apart
    if not isinstance(rule, SOAP):
        block = one_sided[:2, :2].contiguous()
        torch.testing.assert_close(one_sided, torch.kron(torch.eye(6, dtype=F64), block))
    last = P[-42:, -42:]
    torch.testing.assert_close(last, last.diagonal().diag())


@pytest.mark.parametrize("rule", RULES)
def test_steps_train_resume_and_repeat(rule: GradientFactors) -> None:
    dtype = torch.float32 if isinstance(rule, SOAP) else F64

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 2), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale * self.conv(x.view(-1, 1, 2, 2)).flatten(1).tanh())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().to(dtype)
    again, x = copy.deepcopy(net), X.to(dtype)

    def steps(optimizer: PreconditionedMomentum, net: nn.Module, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: F.cross_entropy(net(x), LABELS))

    make = lambda net: PreconditionedMomentum(
        [{"params": net.conv.parameters()}, {"params": [*net.head.parameters(), net.scale], "lr": 0.02}], rule, lr=0.03
    )
    optimizer, other = make(net), make(again)
    start = float(F.cross_entropy(net(x), LABELS).detach())
    steps(optimizer, net, 20)
    assert float(F.cross_entropy(net(x), LABELS).detach()) < 0.97 * start
    assert optimizer.cost.gradients == 20
    assert optimizer.cost.gradient_equivalents == 20
    steps(other, again, 10)
    fresh = make(again)
    fresh.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(fresh, again, 10)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_they_precondition(rule: GradientFactors) -> None:
    """Gradients of batches vary as the curvature does: inputs of a layer with sizes from 1 to 100."""
    x, y = normal(400, 20) * torch.logspace(0, 2, 20, dtype=F64), normal(400, 2, seed=1)
    parameters = ParameterVector([nn.Parameter(torch.zeros(2, 20, dtype=F64))])
    preconditioner = replace(rule, decay=0.99, every=40).make(parameters)
    for row, target in zip(x, y, strict=True):
        preconditioner.take(torch.outer(-target, row).reshape(-1))
    H = torch.kron(torch.eye(2, dtype=F64), x.T @ x / 400)
    own = torch.linalg.eigvals(preconditioner.operator(0.0).to_dense() @ H).real
    assert float(own.max() / own.min()) < 0.2 * float(torch.linalg.cond(H))


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    w = nn.Parameter(torch.ones(2, 2, dtype=F64))
    optimizer = methods.soap([w])
    optimizer.step(lambda: (w**2).sum())
    before = w.detach().clone(), repr(optimizer.state_dict()["preconditioned_momentum"]["means"])
    optimizer.step(lambda: (w**2).sum() * math.nan)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert torch.equal(w.detach(), before[0])
    assert repr(optimizer.state_dict()["preconditioned_momentum"]["means"]) == before[1]


def test_refusals() -> None:
    w = nn.Parameter(torch.ones(2, 2, dtype=F64))
    with pytest.raises(TypeError, match=r"learn from gradients alone.*others are for NewtonKrylov"):
        PreconditionedMomentum([w], Kronecker(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum.*\[0, 1\)"):
        methods.soap([w], momentum=1.0)
    for make in (lambda: SOAP(every=0), lambda: Shampoo(decay=1.0), lambda: KLShampoo(eps=0), lambda: SOAP(largest=0)):
        with pytest.raises(ValueError, match="got"):
            make()
    optimizers = [NewtonKrylov([w], preconditioning=rule) for rule in RULES]
    for optimizer in optimizers:
        optimizer.step(lambda: (w**2).sum())
    for one, other in pairwise(optimizers):
        with pytest.raises(ValueError, match="another preconditioning"):
            one.load_state_dict(other.state_dict())
