"""Normalisation, norms, distances and deviations, taken apart.

PyTorch's own forward mode over forward mode is wrong for the fused operators, and that of norms and what is made of
them cannot be differentiated once more by parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from imstep.pde.forward_mode import by_forward_mode
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


@rule("norm")
def _norm(input: Jet, p: Any = "fro", dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    order = 2 if p in ("fro", None) else p
    if _is_order(order) and kwargs.get("dtype") is None:
        return _of_order(input, order, dim, keepdim)
    return by_forward_mode(torch.norm, (input, p, dim, keepdim), kwargs)


@rule("linalg_vector_norm")
def _vector_norm(x: Jet, ord: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if _is_order(ord) and kwargs.get("dtype") is None:
        return _of_order(x, ord, dim, keepdim)
    return by_forward_mode(torch.linalg.vector_norm, (x, ord, dim, keepdim), kwargs)


@rule("linalg_norm")
def _linalg_norm(A: Jet, ord: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    order: Any = 2 if ord in ("fro", None) else ord if isinstance(dim, int) else None  # None: that of a matrix
    if _is_order(order) and kwargs.get("dtype") is None:
        return _of_order(A, order, dim, keepdim)
    return by_forward_mode(torch.linalg.norm, (A, ord, dim, keepdim), kwargs)


@rule("normalize")
def _normalize(input: Jet, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Any:
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


@rule("std")
def _std(input: Jet, *args: Any, **kwargs: Any) -> Any:
    return _root(torch.var(input, *args, **kwargs))


@rule("std_mean")
def _std_mean(input: Jet, *args: Any, **kwargs: Any) -> Any:
    variance, mean = torch.var_mean(input, *args, **kwargs)
    return _root(variance), mean


@rule("dist")
def _dist(input: Any, other: Any, p: float = 2) -> Any:
    return _norm(input - other, p)


@rule("pairwise_distance")
def _pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


@rule("cosine_similarity")
def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    x1, x2 = x1.expand(shape), x2.expand(shape)
    size = lambda x: torch.linalg.vector_norm(x, 2, dim).clamp_min(eps)
    return (x1 * x2).sum(dim) / (size(x1) * size(x2))


def _is_order(p: Any) -> bool:
    return isinstance(p, (int, float)) and 1 <= p < float("inf")


def _of_order(x: Any, p: float, dim: Any, keepdim: bool) -> Any:
    """(Σ |x_i|^p)^(1/p); no derivatives at 0, as in PyTorch."""
    dim = tuple(range(x.dim())) if dim is None else dim
    if p == 1:
        return x.abs().sum(dim, keepdim=keepdim)
    squares = x.real.square() + x.imag.square() if x.is_complex() else x.square()
    total = (squares if p == 2 else x.abs() ** p).sum(dim, keepdim=keepdim)
    return _root(total, p)


def _root(total: Any, p: float = 2) -> Any:
    """total^(1/p) of what is no less than 0, without derivatives where it is 0."""
    at_zero = total == 0
    positive = total.masked_fill(at_zero, 1.0)
    return (positive.sqrt() if p == 2 else positive ** (1 / p)).masked_fill(at_zero, 0.0)


def _standardised(x: Any, dims: tuple[int, ...], eps: float) -> Any:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
