"""Models that curvature operators are tested on, and dense matrices by PyTorch's reverse mode alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel

F64 = torch.float64
Subject = tuple[nn.Module, Tensor]


class Recurrent(nn.Module):
    """A classifier of sequences."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 1) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, num_layers=layers, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Attention(nn.Module):
    """A language model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def mlp() -> Subject:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), normal(8, 4)


def conv() -> Subject:
    body = (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.SiLU(), nn.MaxPool2d(2))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 2)), normal(5, 2, 8, 8)


def lstm() -> Subject:
    return Recurrent(nn.LSTM), normal(4, 5, 3)


def gru() -> Subject:
    return Recurrent(nn.GRU), normal(4, 5, 3)


def attention() -> Subject:
    return Attention(), torch.arange(6).reshape(2, 3) % 5


MODELS: dict[str, Callable[[], Subject]] = {
    "mlp": mlp, "conv": conv, "lstm": lstm, "gru": gru, "attention": attention
}  # fmt: skip


def build(name: str) -> Subject:
    """A model in double precision, with fixed weights, and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
    return model.double(), inputs


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """PyTorch without the fused kernels that it cannot differentiate twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")
        with mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield


def dense_jacobian(outputs: Tensor, params: list[Tensor]) -> Tensor:
    """(m, n), a row for each entry of ``outputs``, by one backward pass each."""
    rows = [torch.autograd.grad(z, params, retain_graph=True, allow_unused=True) for z in outputs.reshape(-1)]
    flat = lambda row: [torch.zeros_like(p) if g is None else g for g, p in zip(row, params, strict=True)]
    return torch.stack([torch.cat([g.reshape(-1) for g in flat(row)]) for row in rows])


def hessian_products(loss: Tensor, params: list[Tensor], block: Tensor) -> Tensor:
    """H V, (n, k), by double backward."""
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    return dense_jacobian(gradient @ block, params).T


def dense_gauss_newton(outputs: Tensor, params: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Jᵀ L'' J, (n, n), with ``loss`` a function of tensors of the form of ``outputs``."""
    jacobian, at = dense_jacobian(outputs, params), outputs.detach()
    middle = torch.autograd.functional.hessian(lambda flat: loss(flat.view(at.shape)), at.reshape(-1))
    return jacobian.T @ middle @ jacobian


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.norm().clamp(min=1e-300))
