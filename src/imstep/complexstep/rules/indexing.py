"""Reading and writing at indices: linear in what is read and in what is written, the indices being constant."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, linear, rule
from imstep.complexstep.rules.forms import jointly_linear, plus, register_linear, times, zeros_of

aten = torch.ops.aten


def _at_places(rule_of):
    """A rule of (x, dim, index, ...) with a list of one place for an index without dimensions.

    PyTorch's batching of such an index, which blocks of directions meet, takes all of the dimension.
    """

    def linearize(func, args, kwargs):
        x, dim, index, *rest = args
        args = (x, dim, index.reshape(1), *rest) if index.dim() == 0 < x.dim() else args
        return rule_of(func, args, kwargs)

    return linearize


# Reading.
register_linear(_at_places(jointly_linear("self")), aten.index_select.default)
linear(aten._unsafe_index.Tensor, aten.masked_scatter_backward.default, aten.unfold_copy.default)
register_linear(jointly_linear("self", scalar="fill"), aten._unsafe_masked_index.default)

@rule(aten.embedding.default, family="linear", finite=exact)
def embedding(w, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """The row of padding is a constant where it is looked up, as it is to autograd, which gives it no gradient."""

    def push(dw, *_):
        rows = aten.embedding(dw, indices)
        return rows if padding_idx < 0 else rows.masked_fill((indices == padding_idx).unsqueeze(-1), 0)

    return aten.embedding(w, indices, padding_idx, scale_grad_by_freq, sparse), push


# Writing over.
register_linear(jointly_linear("self", scalar="value"), aten.masked_fill.Scalar, aten.scatter.value)
register_linear(jointly_linear("self", scalar="value"), aten.index_fill.int_Scalar)
register_linear(jointly_linear("self", "value"), aten.index_fill.int_Tensor)
register_linear(jointly_linear("self", "values"), aten.index_put.default, aten._unsafe_index_put.default)
register_linear(jointly_linear("self", "values"), aten._unsafe_masked_index_put_accumulate.default)
register_linear(_at_places(jointly_linear("self", "source")), aten.index_copy.default, aten.index_add.default)
register_linear(jointly_linear("self", "source"), aten.put.default, aten.masked_scatter.default)
register_linear(jointly_linear("self", "src"), aten.scatter.src, aten.scatter_add.default, aten.select_scatter.default)
register_linear(jointly_linear("self", "src"), aten.slice_scatter.default, aten.diagonal_scatter.default)


@rule(aten.masked_fill.Tensor, family="linear", finite=exact)
def masked_fill(x, mask, value):
    push = lambda dx, _, dvalue: torch.where(mask, 0 if dvalue is None else dvalue, 0 if dx is None else dx)
    return torch.masked_fill(x, mask, value), push


@rule(aten.fill.Tensor, family="linear", finite=exact)
def fill(x, value):
    """By ``expand``: the operator has no batching rule, which blocks of directions would need."""
    push = lambda _, dvalue: None if dvalue is None else dvalue.expand(x.shape)
    return aten.fill.Tensor(x, value), push


@rule(aten.as_strided_scatter.default, family="linear", finite=exact)
def as_strided_scatter(x, src, size, stride, offset=None):
    """Which entries are meant depends on the strides of x, so the operator itself finds them."""
    laid_out = torch.empty_strided(x.shape, x.stride(), dtype=torch.long, device=x.device).fill_(-1)
    numbers = torch.arange(src.numel(), device=x.device).reshape(src.shape)
    source = torch.as_strided_scatter(laid_out, numbers, size, stride, offset)
    kept, source = source < 0, source.clamp_min(0)

    def push(dx, dsrc):
        return torch.where(kept, 0 if dx is None else dx, 0 if dsrc is None else dsrc.reshape(-1)[source])

    return torch.as_strided_scatter(x, src, size, stride, offset), push


# --- reductions at indices --------------------------------------------------------------------------------------


def _product_slopes(x, index, dim, src, result_of):
    """The product of the others at each entry's place, for x and for src; zeros are counted, not divided by."""
    x_kept = torch.where(x == 0, 1, x)
    src_kept = torch.where(src == 0, 1, src)
    product = result_of(x_kept, src_kept)
    count = (x == 0).to(x.dtype).scatter_add(dim, index, (src == 0).to(x.dtype))
    alone = lambda t, kept, p, n: torch.where(t == 0, torch.where(n == 1, p, 0), torch.where(n == 0, p / kept, 0))
    return alone(x, x_kept, product, count), alone(src, src_kept, product.gather(dim, index), count.gather(dim, index))


def _scatter_reduce(x, dim, index, src, reduce, include_self):
    """The linear map of :func:`torch.scatter_reduce` and its result."""
    if x.dim() == 0:
        y, push = _scatter_reduce(x[None], 0, index.reshape(-1), src.reshape(-1), reduce, include_self)
        one = lambda d: None if d is None else d.reshape(1)
        return y[0], lambda dx, ds: push(one(dx), one(ds))[0]
    op = lambda a, b: torch.scatter_reduce(a, dim, index, b, reduce, include_self=include_self)
    y = op(x, src)
    if reduce in ("sum", "mean"):
        return y, lambda dx, ds: op(zeros_of(y) if dx is None else dx, zeros_of(src) if ds is None else ds)
    if reduce == "prod":
        own = x if include_self else x.scatter(dim, index, torch.ones_like(src))
        plain = lambda a, b: torch.scatter_reduce(a, dim, index, b, "prod", include_self=True)
        by_x, by_src = _product_slopes(own, index, dim, src, plain)
    else:
        attained_by_x, attained_by_src = (x == y).to(x.dtype), (src == y.gather(dim, index)).to(x.dtype)
        count = attained_by_x.scatter_add(dim, index, attained_by_src)
        by_x, by_src = attained_by_x / count.clamp_min(1), attained_by_src / count.gather(dim, index).clamp_min(1)
    if not include_self:
        by_x = by_x.scatter(dim, index, 0.0)

    def push(dx, ds):
        written = None if ds is None else zeros_of(y).scatter_add(dim, index, ds * by_src)
        return plus(times(dx, by_x), written)

    return y, push


@rule(aten.scatter_reduce.two, family="piecewise")
def scatter_reduce(x, dim, index, src, reduce, *, include_self=True):
    y, push = _scatter_reduce(x, dim, index, src, reduce, include_self)
    return y, lambda dx, _, ds: push(dx, ds)


@rule(aten.index_reduce.default, family="piecewise")
def index_reduce(x, dim, index, source, reduce, *, include_self=True):
    shape = [1] * source.dim()
    if source.dim():
        shape[dim] = -1
    everywhere = index.reshape(shape).expand_as(source)
    y, push = _scatter_reduce(x, dim, everywhere, source, reduce, include_self)
    return y, lambda dx, _, ds: push(dx, ds)
