"""Networks with fake quantisation, straight through: products against double backward, steps that go down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import imstep

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, which moves quantisation elsewhere
SCALES, ZEROS = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32)


def by_channel() -> nn.Module:
    return quantization.FusedMovingAvgObsFakeQuantize(
        observer=quantization.MovingAveragePerChannelMinMaxObserver,
        ch_axis=0,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


# Made anew for each test: observers go on observing.
QUANTISERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "per tensor": lambda: lambda t: torch.fake_quantize_per_tensor_affine(t, 0.1, 0, -8, 7),
    "by tensors": lambda: lambda t: torch.fake_quantize_per_tensor_affine(t, SCALES[0], ZEROS[0], -8, 7),
    "per channel": lambda: lambda t: torch.fake_quantize_per_channel_affine(t, SCALES, ZEROS, 0, -8, 7),
    "observed": quantization.FakeQuantize,
    "fused": quantization.FusedMovingAvgObsFakeQuantize,
    "fused by channel": by_channel,
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_fake_quantisation_of_a_weight(name: str) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    x, y, quantise = torch.randn(6, 3), torch.randn(6, 2), QUANTISERS[name]()
    closure = lambda: F.mse_loss(F.linear(first(x).tanh(), quantise(last.weight), last.bias), y)
    closure()
    params = [*first.parameters(), *last.parameters()]
    direction = [torch.randn_like(p) for p in params]
    gradients = torch.autograd.grad(closure(), params, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(slope, params)])
    H = imstep.Hessian(closure, params)
    torch.testing.assert_close(H @ torch.cat([d.reshape(-1) for d in direction]), expected, rtol=1e-4, atol=1e-5)
    for optimizer in (imstep.NewtonKrylov(params), imstep.LeastSquares(params)):
        before = float(closure())
        for _ in range(3):
            optimizer.step(closure)
        assert float(closure()) < before
