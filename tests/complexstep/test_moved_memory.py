"""Closures that give a tensor other memory: imaginary parts lie beside memory and would stay behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import imstep

MOVES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda t: setattr(t, "data", t.data.clone()),
    "set_": lambda t: t.set_(t.detach().clone()),
    "set_ to a storage": lambda t: t.set_(t.detach().clone().untyped_storage(), 0, t.shape),
    "swap_tensors": lambda t: torch.utils.swap_tensors(t, nn.Parameter(t.detach().clone())),
}
DIRECTION = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton"])
def test_parameters_that_move_are_refused(kind, move):
    w = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            move(w)
        return w**2, DIRECTION

    def product() -> Tensor:
        if kind == "Hessian":
            return imstep.Hessian(lambda: F.mse_loss(*outputs()), [w]) @ DIRECTION
        return imstep.GaussNewton(outputs, [w], F.mse_loss) @ DIRECTION

    with pytest.raises(imstep.UnsupportedOperatorError, match=r"other memory.*before the closure"):
        product()


@pytest.mark.parametrize("move", [MOVES["data"], MOVES["set_"]])
@pytest.mark.parametrize("h", [None, 1e-20])
def test_results_that_move_are_refused(move, h):
    def f(x: Tensor) -> Tensor:
        y = x**2
        with torch.no_grad():
            move(y)
        return y.square().sum()

    with pytest.raises(imstep.UnsupportedOperatorError, match="other memory"):
        imstep.hvp(f, DIRECTION, DIRECTION, h=h)


def test_constants_may_move():
    def f(x: Tensor) -> Tensor:
        constant = torch.zeros(3, dtype=torch.float64)
        constant.data = torch.full((3,), 2.0, dtype=torch.float64)
        return (constant * x**2).sum()

    torch.testing.assert_close(imstep.hvp(f, DIRECTION, DIRECTION), 4 * DIRECTION)


def _as_cudnn(weights, *sizes):
    """What PyTorch's kernel for GPUs does: one memory for all weights."""
    memory = torch.cat([w.reshape(-1) for w in weights])
    for w, part in zip(weights, memory.split([w.numel() for w in weights]), strict=True):
        w.set_(part.view_as(w))
    return memory


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize(("kind", "mode"), [(nn.LSTM, 2), (nn.GRU, 3)])
def test_recurrent_networks_of_a_gpu(kind, mode, h):
    """Called with other weights than its own, one has cuDNN put them together in each forward pass."""
    torch.manual_seed(0)
    module, x = kind(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    point = {k: p.detach() for k, p in module.named_parameters()}
    direction = {k: torch.randn_like(p) for k, p in point.items()}
    loss = lambda q: functional_call(module, q, (x,))[0].pow(2).sum()

    def flattened(q: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            torch._cudnn_rnn_flatten_weight(list(q.values()), 4, 3, mode, 4, 0, 1, False, False)
        return loss(q)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_cudnn_rnn_flatten_weight", _as_cudnn, "CPU")
    try:
        found = imstep.hvp(flattened, point, direction, h=h)
    finally:
        library._destroy()
    torch.testing.assert_close(found, imstep.hvp(loss, point, direction))
