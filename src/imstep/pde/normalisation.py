"""Normalisation, taken apart: PyTorch's own forward mode over forward mode is wrong for the fused operators."""

from __future__ import annotations

from typing import Any

import torch

from imstep.pde.jet import ExpansionError, Jet, rule


@rule("layer_norm")
def _layer_norm(input: Jet, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    return _affine(_standardised(input, dims, eps), weight, bias)


@rule("rms_norm")
def _rms_norm(input: Jet, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * (input.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


@rule("group_norm")
def _group_norm(input: Jet, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    shape = input.shape
    groups = input.reshape(shape[0], num_groups, -1)
    channels = (shape[1], *[1] * (len(shape) - 2))
    own = [None if t is None else t.reshape(channels) for t in (weight, bias)]
    return _affine(_standardised(groups, (-1,), eps).reshape(shape), *own)


@rule("batch_norm")
def _batch_norm(
    input: Jet, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if training:
        raise ExpansionError(
            "batch normalisation in train mode makes the value at one point depend on all points, so that the field "
            "has no derivatives point by point. Call .eval() on it."
        )
    channels = (-1, *[1] * (input.dim() - 2))
    own = [None if t is None else t.reshape(channels) for t in (weight, bias)]
    scale = (running_var + eps).rsqrt().reshape(channels)
    return _affine((input - running_mean.reshape(channels)) * scale, *own)


def _standardised(x: Any, dims: tuple[int, ...], eps: float) -> Any:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
