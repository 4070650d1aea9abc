"""AdaHessian and Sophia against plain transcriptions of their papers' formulas, on the same probes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep import methods
from imstep.curvature.sampled_diagonal import sampled_diagonal
from imstep.optim import AdaHessianRule, DiagonalNewton, HessianScaledMomentum, Kronecker, SophiaG, SophiaH, StepOutcome

ROOT = normal(6, 6)
A = ROOT @ ROOT.T / 6 + torch.eye(6, dtype=F64)
B = normal(6, seed=1)


def quadratic(w: Tensor) -> Tensor:
    return w @ (A @ w) / 2 - B @ w


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_adahessian_is_its_paper_s_algorithm(power: float, every: int) -> None:
    w, x = nn.Parameter(torch.ones(6, dtype=F64)), torch.ones(6, dtype=F64)
    optimizer = methods.adahessian([w], AdaHessianRule(power=power, every=every), lr=0.1, seed=4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(4)
    m, v, estimates = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64), 0
    for t in range(1, 21):
        g = A @ x - B
        if (t - 1) % every == 0:
            z = 2.0 * torch.randint(2, (6,), generator=generator).to(F64) - 1
            D = z * (A @ z)
            v, estimates = 0.999 * v + 0.001 * D**2, estimates + 1
        m = 0.9 * m + 0.1 * g
        denominator = (v / (1 - 0.999**estimates)).sqrt() ** power + 1e-4
        x = x - 0.1 * (m / (1 - 0.9**t) / denominator + 0.05 * x)
        optimizer.step(lambda: quadratic(w))
        torch.testing.assert_close(w.detach(), x, rtol=1e-10, atol=1e-12)


def test_sophia_h_is_its_paper_s_algorithm() -> None:
    w, x = nn.Parameter(torch.ones(6, dtype=F64)), torch.ones(6, dtype=F64)
    optimizer = methods.sophia([w], SophiaH(gamma=20.0, every=4), lr=0.03, seed=2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    m, h = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    clipped = 0
    for t in range(1, 31):
        m = 0.96 * m + 0.04 * (A @ x - B)
        if t % 4 == 1:
            u = torch.empty(6, dtype=F64).normal_(generator=generator)
            h = 0.99 * h + 0.01 * u * (A @ u)
        x = x - 0.03 * 0.1 * x
        ratio = m / torch.maximum(20.0 * h, torch.tensor(1e-12, dtype=F64))
        clipped += int((ratio.abs() > 1).sum())
        x = x - 0.03 * ratio.clamp(-1, 1)
        optimizer.step(lambda: quadratic(w))
        torch.testing.assert_close(w.detach(), x, rtol=1e-10, atol=1e-12)
    assert 0 < clipped < 180


def test_sophia_g_takes_the_batch_s_size_times_the_square_of_a_sampled_gradient() -> None:
    """Algorithm 2: labels from the model, the gradient of their mean loss, squared, times B."""
    net = network()
    optimizer = methods.sophia(net.parameters(), SophiaG(every=2), lr=0.01, seed=3)
    before = copy.deepcopy(net)
    optimizer.step(lambda: F.cross_entropy(net(X), LABELS))
    p = before(X).softmax(1)
    labels = torch.multinomial(p.detach(), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    sampled = torch.autograd.grad(F.cross_entropy(before(X), labels), tuple(before.parameters()))
    g = torch.autograd.grad(F.cross_entropy(before(X), LABELS), tuple(before.parameters()))
    for w, x, s, d in zip(net.parameters(), before.parameters(), sampled, g, strict=True):
        h = 0.01 * 30 * s**2
        expected = x - 0.01 * (0.04 * d / (0.05 * h).clamp(min=1e-12)).clamp(-1, 1)
        torch.testing.assert_close(w.detach(), expected.detach(), rtol=1e-8, atol=1e-10)
    assert optimizer.last_step.cost.gradient_equivalents == pytest.approx(4 / 3 + 2 / 3)
    optimizer.step(lambda: F.cross_entropy(net(X), LABELS))
    assert optimizer.last_step.cost.gradient_equivalents == 1


def test_the_sampled_diagonal_is_right_in_the_mean() -> None:
    w = nn.Parameter(normal(4, seed=5))
    from imstep.curvature.frozen import FrozenClosure
    from imstep.curvature.parameters import ParameterVector

    parameters = ParameterVector([w])
    frozen = FrozenClosure(lambda: F.mse_loss(X @ w, X[:, 0]), parameters)
    generator = torch.Generator().manual_seed(0)
    point, total = frozen.linearise(keep_graph=True), torch.zeros(4, dtype=F64)
    for _ in range(400):
        total += sampled_diagonal(point, parameters, generator) / 400
    torch.testing.assert_close(total, 2 * X.square().mean(0), rtol=0.25, atol=0)


def test_spatial_averages_are_over_a_kernel() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).to(F64)
    data = normal(5, 1, 4, 4)
    means = []
    for spatial in (False, True):
        model = copy.deepcopy(net)
        optimizer = methods.adahessian(model.parameters(), AdaHessianRule(spatial=spatial), seed=1)
        optimizer.step(lambda model=model: F.cross_entropy(model(data), LABELS[:5]))
        means.append(optimizer._parameters.unflatten(optimizer._means.curvature / 0.001))
    plain, averaged = means
    expected = plain[0].sqrt().mean((2, 3), keepdim=True).square().expand_as(averaged[0])
    torch.testing.assert_close(averaged[0], expected)
    for a, b in zip(plain[1:], averaged[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", [AdaHessianRule(), SophiaG(every=3), SophiaH(every=3)])
def test_they_train_resume_and_repeat(rule: object) -> None:
    def steps(optimizer: DiagonalNewton, net: nn.Module, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: F.cross_entropy(net(X), LABELS))

    lr = 0.1 if isinstance(rule, AdaHessianRule) else 0.02
    net, again = network(), network()
    optimizer, other = (DiagonalNewton(n.parameters(), rule, lr=lr, seed=7) for n in (net, again))
    start = float(F.cross_entropy(net(X), LABELS).detach())
    steps(optimizer, net, 40)
    assert float(F.cross_entropy(net(X), LABELS).detach()) < 0.9 * start
    steps(other, again, 20)
    fresh = DiagonalNewton(again.parameters(), rule, lr=lr, seed=0)
    fresh.load_state_dict(other.state_dict())
    steps(fresh, again, 20)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_rates_of_groups_frozen_entries_and_bounds() -> None:
    w, v = nn.Parameter(torch.ones(3, dtype=F64)), nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = methods.sophia([{"params": [w], "lr": 0.0}, {"params": [v]}], lr=1.0, max_step_norm=0.1)
    optimizer.step(lambda: F.mse_loss(w + v, torch.zeros(3, dtype=F64)))
    assert torch.equal(w.detach(), torch.ones(3, dtype=F64))
    assert float((v.detach() - 1).norm()) == pytest.approx(0.1)
    assert optimizer.last_step.step_norm == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = methods.adahessian([w])
    optimizer.step(lambda: (w**2).sum())
    before = w.detach().clone(), copy.deepcopy(optimizer.state_dict()["diagonal_newton"]["means"])
    optimizer.step(lambda: (w**2).sum() * math.nan)
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert torch.equal(w.detach(), before[0])
    after = optimizer.state_dict()["diagonal_newton"]["means"]
    assert all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(before[1][k])) for k in after)


def test_refusals() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    with pytest.raises(ValueError, match=r"convex function of the model's outputs.* Use SophiaH\(\)"):
        methods.sophia([w]).step(lambda: (w[0] * w[1]).sin())
    with pytest.raises(TypeError, match="rule must be a DiagonalRule"):
        DiagonalNewton([w], Kronecker(), lr=1.0)
    for make in (lambda: SophiaG(every=0), lambda: SophiaH(gamma=0), lambda: AdaHessianRule(beta2=1.0)):
        with pytest.raises(ValueError, match="got"):
            make()


def test_hessian_scaled_momentum_is_its_formula() -> None:
    w, x = nn.Parameter(torch.ones(6, dtype=F64)), torch.ones(6, dtype=F64)
    optimizer = methods.hessian_momentum([w], HessianScaledMomentum(every=3), lr=0.3, seed=4)
    generator, m, h, estimates = torch.Generator().manual_seed(4), 0, 0, 0
    for t in range(1, 13):
        if (t - 1) % 3 == 0:
            z = 2.0 * torch.randint(2, (6,), generator=generator).to(F64) - 1
            h, estimates = 0.99 * h + 0.01 * (z * (A @ z)).abs(), estimates + 1
        m = 0.9 * m + 0.1 * (A @ x - B)
        size = h / (1 - 0.99**estimates)
        x = x - 0.3 * m / (1 - 0.9**t) / (size + 0.1 * size.mean())
        optimizer.step(lambda: quadratic(w))
        torch.testing.assert_close(w.detach(), x, rtol=1e-10, atol=1e-12)
