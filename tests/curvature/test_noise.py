"""How often the noise test disturbs on batches of a network, against the curvature of all examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from imstep.curvature import FrozenClosure, ParameterVector
from imstep.curvature.halves import HalvedTapeOperator
from imstep.curvature.hessian import gauss_newton_of
from imstep.linalg import NoiseTest

F64 = torch.float64
EXAMPLES, BATCH = 2_000, 128


def target(x: Tensor) -> Tensor:
    """A product of bounded factors, which so small a network does not fit: negative curvature remains."""
    return 2 * x.tanh().prod(-1, keepdim=True)


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(F64)
        x = torch.randn(EXAMPLES, 3, dtype=F64)
        return model, x, target(x)


def curvature_by_example(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """vᵀ∇²v of each example's squared error, its Hessian and not only its Gauss-Newton part, (examples,)."""
    parameters = dict(model.named_parameters())
    tangents = dict(zip(parameters, ParameterVector(model).unflatten(direction), strict=True))

    def of_one(x: Tensor) -> Tensor:
        error = lambda p: ((torch.func.functional_call(model, p, (x,)) - target(x)) ** 2).sum()
        slope = lambda p: torch.func.jvp(error, (p,), (tangents,))[1]
        return torch.func.jvp(slope, (parameters,), (tangents,))[1]

    return torch.vmap(of_one)(x).detach()


@pytest.mark.parametrize("z", [1.0, 2.0])
def test_on_batches_of_a_network_the_rate_follows_from_the_curvature_of_all_examples(z: float) -> None:
    """Mean and spread over all examples foretell what halves of random batches do, along directions of any signal."""
    model, x, _ = regression()
    generator = torch.Generator().manual_seed(1)
    signals = []
    for _ in range(12):
        values = curvature_by_example(model, x, torch.randn(26, dtype=F64, generator=generator))
        signal = float(values.mean() / values.std() * math.sqrt(BATCH))
        batches = values[torch.randint(EXAMPLES, (4_000, BATCH), generator=generator)]
        pairs = zip(batches[:, 0::2].mean(1).tolist(), batches[:, 1::2].mean(1).tolist(), strict=True)
        seen = sum(NoiseTest(z=z).disturbs(*pair) for pair in pairs) / 4_000
        # The means of 64 skewed values are normal to a few percent only.
        assert NoiseTest(z=z).rate(signal) == pytest.approx(seen, abs=0.05)
        signals.append(signal)
    assert min(signals) < 1.5 < 5 < max(signals)


def test_halves_of_a_tape_disturb_as_often_as_those_of_all_examples() -> None:
    model, x, y = regression()
    parameters = ParameterVector(model)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(parameters.size, dtype=F64, generator=generator)
    seen = expected = 0
    for _ in range(60):
        at = torch.randint(EXAMPLES, (8,), generator=generator)
        closure = lambda at=at: nn.functional.mse_loss(model(x[at]), y[at])
        point = FrozenClosure(closure, parameters).linearise(keep_graph=True)
        halved = HalvedTapeOperator(gauss_newton_of(point, parameters), point)
        _, first, second = halved.measure(direction)
        seen += NoiseTest(z=2.0).disturbs(first, second)
        outputs = lambda p, at=at: torch.func.functional_call(model, p, (x[at],))
        names = dict(model.named_parameters())
        tangents = dict(zip(names, parameters.unflatten(direction), strict=True))
        by_example = 2 * torch.func.jvp(outputs, (names,), (tangents,))[1].detach().square().sum(1)
        one, other = by_example[0::2].mean(), by_example[1::2].mean()
        expected += bool((one + other) <= 2 * (one - other).abs())
    assert seen == expected
    assert 0 < seen < 60
