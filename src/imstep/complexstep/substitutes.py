"""Functions whose fused kernels PyTorch cannot differentiate twice, written with operators that it can.

They stand in for the originals while an arithmetic is active, one level above autograd, so that autograd records the
simple operators. Values and gradients are those of the originals to rounding, for inputs where these are
differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.complexstep.determinants import determinant, is_nearly_singular
from imstep.complexstep.special_points import (
    bessel_i1,
    cumprod,
    dist,
    float_power,
    in_place,
    index_reduce,
    logaddexp,
    logaddexp2,
    lp_pool,
    polar,
    power,
    prod,
    scatter_reduce,
    segment_reduce,
    sinc,
)

_MODES = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")
_BILINEAR, _NEAREST, _BICUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2
_NONE, _MEAN, _SUM = 0, 1, 2


# --- sampling on a grid ---------------------------------------------------------------------------------------------


def grid_sample(
    x: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Tensor:
    """:func:`torch.nn.functional.grid_sample`."""
    if mode not in _MODES or padding_mode not in _PADDINGS or grid.dim() != x.dim() or grid.shape[-1] != x.dim() - 2:
        return F.grid_sample(x, grid, mode, padding_mode, align_corners)  # raises
    return grid_sampler(x, grid, _MODES.index(mode), _PADDINGS.index(padding_mode), bool(align_corners))


def grid_sampler(
    x: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """``torch.grid_sampler``: x (N, C, *spatial) sampled at grid (N, *points, d), coordinates in [-1, 1]."""
    mode, padding = interpolation_mode, padding_mode
    if mode == _BICUBIC:
        from torch._decomp.decompositions import _grid_sampler_2d

        return _grid_sampler_2d(x, grid, mode, padding, align_corners)
    sizes = x.shape[2:]
    places = []  # the coordinates of x and grid run in opposite order
    for size, coordinate in zip(sizes, reversed(grid.unbind(-1)), strict=True):
        place = (coordinate + 1) / 2 * (size - 1) if align_corners else ((coordinate + 1) * size - 1) / 2
        places.append(_padded(place, size, padding, align_corners))
    if mode == _NEAREST:
        return _taken(x, [p.round() for p in places])
    below = [p.floor() for p in places]
    total: Any = 0.0
    for corner in product((0, 1), repeat=len(sizes)):
        weight: Any = 1.0
        for up, place, low in zip(corner, places, below, strict=True):
            weight = weight * (place - low if up else low + 1 - place)
        total = total + _taken(x, [low + up for low, up in zip(below, corner, strict=True)]) * weight.unsqueeze(1)
    return total


def _padded(place: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    if padding == _ZEROS:
        return place
    if padding == _REFLECTION:
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(place)
        distance = (place - low).abs()
        turns = (distance / span).floor()
        rest = distance - turns * span
        place = torch.where(turns % 2 == 0, rest, span - rest) + low
    return place.clamp(0, size - 1)


def _taken(x: Tensor, places: Sequence[Tensor]) -> Tensor:
    """The entries of x at integer places, zero outside; (N, C, *points)."""
    sizes = x.shape[2:]
    inside = torch.ones_like(places[0], dtype=torch.bool)
    flat: Any = 0
    for size, place in zip(sizes, places, strict=True):
        inside = inside & (place >= 0) & (place <= size - 1)
        flat = flat * size + place.clamp(0, size - 1).long()
    count, channels = x.shape[:2]
    index = flat.reshape(count, 1, -1).expand(-1, channels, -1)
    values = x.reshape(count, channels, -1).gather(2, index).reshape(count, channels, *inside.shape[1:])
    return values * inside.unsqueeze(1)


# --- connectionist temporal classification --------------------------------------------------------------------------


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.ctc_loss`."""
    code = ("none", "mean", "sum").index(reduction)
    return ctc_sum(log_probs, targets, input_lengths, target_lengths, blank, code, zero_infinity)


def ctc_sum(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """``torch.ctc_loss`` by the forward recursion of Graves et al. (2006), equations (6) and (7), on logarithms."""
    alone = log_probs.dim() == 2
    if alone:
        log_probs = log_probs.unsqueeze(1)
    labels = [int(n) for n in _listed(target_lengths)]
    rows = targets.split(labels) if targets.dim() == 1 else [t[:n] for t, n in zip(targets, labels, strict=True)]
    losses = _ctc_losses(log_probs, rows, log_probs.new_tensor(_listed(input_lengths), dtype=torch.long), blank)
    if zero_infinity:
        losses = torch.where(losses.isinf(), 0, losses)
    if reduction == _MEAN:
        return (losses / losses.new_tensor(labels).clamp(min=1)).mean()
    if reduction == _SUM:
        return losses.sum()
    return losses[0] if alone else losses


def _listed(lengths: Tensor | Sequence[int]) -> list[int]:
    return lengths.reshape(-1).tolist() if isinstance(lengths, Tensor) else list(lengths)


def _ctc_losses(log_probs: Tensor, rows: Sequence[Tensor], times: Tensor, blank: int) -> Tensor:
    """The losses of sequences, (batch,): log_probs (time, batch, classes), rows of labels, times (batch,)."""
    labels = times.new_tensor([len(row) for row in rows])
    states = times.new_full((len(rows), 2 * int(labels.max()) + 1), blank)
    for state, row in zip(states, rows, strict=True):
        state[1 : 2 * len(row) : 2] = row
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    running = torch.arange(len(log_probs), device=times.device)[:, None, None] < times[:, None]
    emitted = torch.where(running, log_probs.gather(2, states.expand(len(log_probs), *states.shape)), 0)
    never = torch.finfo(log_probs.dtype).min / 4  # -inf would give nan in the derivative of logaddexp
    first = (torch.arange(states.shape[1], device=times.device) < 2) & (times > 0)[:, None]
    alpha = torch.where(first, emitted[0], never)
    for step, goes_on in zip(emitted[1:], running[1:], strict=True):
        before = F.pad(alpha, (2, 0), value=never)
        skipped = torch.where(skips, before[:, :-2], never)
        moved = torch.logsumexp(torch.stack([alpha, before[:, 1:-1], skipped]), 0) + step
        alpha = torch.where(goes_on, moved, alpha)
    ends = torch.stack([2 * labels, (2 * labels - 1).clamp(min=0)], 1)
    last = torch.where(torch.stack([labels >= 0, labels > 0], 1), alpha.gather(1, ends), never)
    losses = -torch.logsumexp(last, 1)
    losses = torch.where(losses > -never / 2, math.inf, losses)
    return torch.where((times == 0) & (labels == 0), 0, losses)


# --- what stands in for what, and when ------------------------------------------------------------------------------


def _exponent_has_zeros(x: Any, exponent: Any = None, **_: Any) -> bool:
    tensors = isinstance(exponent, Tensor) and isinstance(x, Tensor) and not x.is_complex()
    return tensors and exponent.is_floating_point() and _any_zero(exponent)


def _real(*arguments: Any, **named: Any) -> bool:
    return all(isinstance(a, Tensor) and a.is_floating_point() for a in (*arguments, *named.values()))


def _has_zeros(x: Tensor, *_: Any, **__: Any) -> bool:
    return x.dim() > 0 and (x.is_floating_point() or x.is_complex()) and _any_zero(x)


def _any_zero(x: Tensor) -> bool:
    # Under a transform the entries cannot be asked for.
    return torch._C._functorch.maybe_current_level() is None and bool((x == 0).any())


def _not_euclidean(x: Tensor, other: Tensor | None = None, p: float = 2.0) -> bool:
    return p != 2


def _product_has_zeros(
    x: Tensor, dim: int, index: Tensor, src: Any = None, reduce: str = "", *, source: Any = None, **_: Any
) -> bool:
    src = source if src is None else src
    return reduce == "prod" and isinstance(src, Tensor) and src.dim() > 0 and (_any_zero(src) or _any_zero(x))


def _segment_has_zeros(x: Tensor, reduce: str = "", *, axis: int = 0, **lengths: Any) -> bool:
    simple = axis == 0 and any(t is not None and t.dim() == 1 for t in map(lengths.get, ("lengths", "offsets")))
    return simple and reduce == "prod" and _any_zero(x)


def _always(*_: Any, **__: Any) -> bool:
    return True


SUBSTITUTES: dict[Any, tuple[Callable[..., Tensor], Callable[..., bool]]] = {
    F.grid_sample: (grid_sample, _always),
    torch.grid_sampler: (grid_sampler, _always),
    torch.grid_sampler_2d: (grid_sampler, _always),
    torch.grid_sampler_3d: (grid_sampler, _always),
    F.ctc_loss: (ctc_loss, _always),
    torch.ctc_loss: (ctc_sum, _always),
    **dict.fromkeys((torch.cumprod, Tensor.cumprod), (cumprod, _has_zeros)),
    Tensor.cumprod_: (in_place(cumprod), _has_zeros),
    **dict.fromkeys((torch.prod, Tensor.prod), (prod, _has_zeros)),
    **dict.fromkeys((torch.scatter_reduce, Tensor.scatter_reduce), (scatter_reduce, _product_has_zeros)),
    Tensor.scatter_reduce_: (in_place(scatter_reduce), _product_has_zeros),
    **dict.fromkeys((torch.index_reduce, Tensor.index_reduce), (index_reduce, _product_has_zeros)),
    Tensor.index_reduce_: (in_place(index_reduce), _product_has_zeros),
    torch.segment_reduce: (segment_reduce, _segment_has_zeros),
    **dict.fromkeys((torch.det, torch.linalg.det, Tensor.det), (determinant, is_nearly_singular)),
    torch.special.i1: (bessel_i1, _real),
    torch.polar: (polar, _always),
    **dict.fromkeys((torch.dist, Tensor.dist), (dist, _not_euclidean)),
    F.lp_pool1d: (lp_pool(F.lp_pool1d, F.max_pool1d, 1), _has_zeros),
    F.lp_pool2d: (lp_pool(F.lp_pool2d, F.max_pool2d, 2), _has_zeros),
    F.lp_pool3d: (lp_pool(F.lp_pool3d, F.max_pool3d, 3), _has_zeros),
    **dict.fromkeys((torch.sinc, Tensor.sinc, torch.special.sinc), (sinc, _real)),
    **dict.fromkeys((torch.sinc_, Tensor.sinc_), (in_place(sinc), _real)),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), (power, _exponent_has_zeros)),
    **dict.fromkeys((Tensor.pow_, Tensor.__ipow__), (in_place(power), _exponent_has_zeros)),
    **dict.fromkeys((torch.float_power, Tensor.float_power), (float_power, _exponent_has_zeros)),
    **dict.fromkeys((torch.logaddexp, Tensor.logaddexp), (logaddexp, _real)),
    **dict.fromkeys((torch.logaddexp2, Tensor.logaddexp2), (logaddexp2, _real)),
}
"""What stands in for a function, and for which arguments it has to."""

if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13; working in chunks, it computes gradients in its forward pass
    SUBSTITUTES[F.linear_cross_entropy] = (
        lambda *args, options=None, **kwargs: F.linear_cross_entropy(*args, **kwargs),
        _always,
    )
