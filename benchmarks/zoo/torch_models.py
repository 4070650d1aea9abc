"""Small networks of PyTorch's own modules, of kinds whose double backward is known to be wrong or missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.problem import Problem, draw, scalar


def _sequential(*layers: nn.Module, shape: tuple[int, ...] = (6, 8), single: bool = False) -> Problem:
    module = nn.Sequential(*layers)
    return _of(module, lambda x: module(x), shape, single)


def _of(module: nn.Module, f: Callable[[Tensor], object], shape: tuple[int, ...], single: bool = False) -> Problem:
    x = draw(*shape)
    return Problem(module, lambda: scalar(f(x.to(next(module.parameters()).dtype))), single)


def weight_norm() -> Problem:
    normed = parametrizations.weight_norm
    return _sequential(normed(nn.Linear(8, 8)), nn.Tanh(), normed(nn.Linear(8, 3)))


def spectral_norm() -> Problem:
    return _sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))


def orthogonal() -> Problem:
    return _sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))


def ctc() -> Problem:
    module = nn.Linear(8, 5)
    targets = torch.tensor([[1, 2, 2, 4], [3, 1, 4, 1]])
    return _of(
        module, lambda x: F.ctc_loss(module(x).log_softmax(-1), targets, [12, 11], [4, 3]), (12, 2, 8)
    )


def activation(kind: type[nn.Module]) -> Problem:
    return _sequential(nn.Linear(8, 16), kind(), nn.Linear(16, 3))


def recurrent(kind: type[nn.RNNBase]) -> Problem:
    """In float32, where PyTorch takes oneDNN."""
    module = kind(8, 16, num_layers=2, batch_first=True)
    return _of(module, lambda x: module(x)[0], (3, 6, 8), single=True)


def attention() -> Problem:
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    return _of(module, lambda x: module(x, x, x, need_weights=False)[0], (2, 5, 16))


def encoder(checkpointed: bool) -> Problem:
    module = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    run = lambda x: checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
    return _of(module, run, (2, 5, 16))


def distances() -> Problem:
    """The kernel of a Gaussian process, one of whose inducing points lies on a datum."""
    module, x = nn.Module(), draw(7, 2)
    module.points = nn.Parameter(x[:4].clone() + torch.tensor([[0.0], [0.1], [0.2], [0.3]]))
    return Problem(module, lambda: scalar(torch.exp(-(torch.cdist(x.to(module.points), module.points) ** 2) / 2)))


def convolutions(norm: Callable[[], nn.Module]) -> Problem:
    return _sequential(
        nn.Conv2d(3, 8, 3), norm(), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3),
        shape=(4, 3, 12, 12),
    )  # fmt: skip


def sampled() -> Problem:
    module = nn.Linear(6, 6)
    pictures = draw(2, 1, 7, 7, seed=4)
    grid = lambda x: torch.tanh(module(x)).view(2, 3, 3, 2)
    return _of(module, lambda x: F.grid_sample(pictures.to(x), grid(x), align_corners=False), (2, 3, 6))


_ACTIVATIONS = (nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.GELU, nn.Mish, nn.CELU, nn.PReLU)


def cases() -> dict[str, Callable[[], Problem]]:
    """Name -> how to build it."""
    found: dict[str, Callable[[], Problem]] = {
        "weight_norm": weight_norm,
        "spectral_norm": spectral_norm,
        "orthogonal": orthogonal,
        "ctc_loss": ctc,
        "MultiheadAttention": attention,
        "TransformerEncoderLayer": partial(encoder, False),
        "TransformerEncoderLayer, checkpointed": partial(encoder, True),
        "cdist": distances,
        "BatchNorm": partial(convolutions, lambda: nn.BatchNorm2d(8)),
        "GroupNorm": partial(convolutions, lambda: nn.GroupNorm(2, 8)),
        "InstanceNorm": partial(convolutions, lambda: nn.InstanceNorm2d(8, affine=True)),
        "grid_sample": sampled,
        **{kind.__name__: partial(recurrent, kind) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    }
    found |= {kind.__name__: partial(activation, kind) for kind in _ACTIVATIONS}
    return {f"torch/{name}": build for name, build in found.items()}
