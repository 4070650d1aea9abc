"""Sums of matrix products, in one output, for one direction or for a block of directions.

A block of k directions is replayed under ``torch.vmap``. PyTorch's own batching of a product copies matrices into
layouts that it can fold into one, and cannot add onto an output. Here the block is in front. With a constant matrix it
is one product, its rows or columns side by side, unless they would have to be copied; other products are one batched
kernel if small, else k of their own.
"""

from __future__ import annotations

import torch

from imstep.complexstep.gemm import multiply, multiply_onto, pays

_C = torch._C._functorch


def in_place(c, *others):
    """Whether ``c`` has room for what an operator with ``others`` adds to it: it has the batches that they have."""
    batched = [t for t in others if t is not None and _batched(t)]
    return _of_one_vmap(c, *batched) if _batched(c) else not batched


def product(a, b, onto=None):
    """a b, or onto + a b in the memory of ``onto``; matrices, or batches of them."""
    several = _batched(a), _batched(b)
    if not any(several):
        return _plain(a, b, onto)
    given = [t for t, batched in zip((a, b), several, strict=True) if batched]
    if not _of_one_vmap(*given) or (onto is not None and not (_batched(onto) and _of_one_vmap(onto))):
        return torch.matmul(a, b) if onto is None else onto + torch.matmul(a, b)
    a, b = (_physical(t) if batched else t for t, batched in zip((a, b), several, strict=True))
    if onto is not None:
        _accumulate(_physical(onto), a, b, *several)
        return onto
    return _C._add_batch_dim(_fresh(a, b, *several), 0, 1)


def addcmul_(c, a, b, value=1):
    """c + value a b entry by entry, in the memory of c where it has room."""
    if not in_place(c, a, b):
        return torch.addcmul(c, a, b, value=value)
    if not _batched(c):
        return c.addcmul_(a, b, value=value)
    # PyTorch has no batching rule for the operator in place.
    k, d = _length(c), c.dim()
    _in_front(c, k).addcmul_(_aligned(a, k, d), _aligned(b, k, d), value=value)
    return c


def in_front(push):
    """Let ``push`` take and return tensors with the block as a further first dimension, of length 1 for one direction.

    It may then write into memory of its own, for which PyTorch has no batching rules.
    """

    def pushed(*ims):
        level = _level(*ims)
        if not level:
            return _each(lambda y: y[0], push(*_each(lambda t: t[None], ims)))
        k = _length(*ims)
        blocks = _each(lambda t: _in_front(t, k, level), ims)
        made = _stacked(pushed, blocks) if _level(*blocks) else push(*blocks)  # a vmap around this one has a level
        return _each(lambda y: _C._add_batch_dim(y, 0, level), made)

    return pushed


def _stacked(push, blocks):
    k = next(len(t) for t in blocks if t is not None)
    singles = [push(*_each(lambda t, at=at: t[at], blocks)) for at in range(k)]
    return tuple(None if ys[0] is None else torch.stack(ys) for ys in zip(*singles, strict=True))


def _each(f, tensors):
    return tuple(None if t is None else f(t) for t in tensors)


# --- products -------------------------------------------------------------------------------------------------------

_FEW = 2**14  # entries of a matrix that may be copied for a better product


def _plain(a, b, onto):
    if a.dim() == 2:
        return multiply(a, b) if onto is None else multiply_onto(onto, a, b)
    return torch.bmm(a, b) if onto is None else onto.baddbmm_(a, b)


def _fresh(a, b, of_a, of_b):
    """The product of matrices, or of batches of them, of which one or both have a block in front."""
    together = _as_one(a, b, of_a, of_b)
    if together is not None:
        return together.contiguous()
    if a.layout is not torch.strided or b.layout is not torch.strided:
        count = len(a if of_a else b)
        return torch.stack([_plain(a[k] if of_a else a, b[k] if of_b else b, None) for k in range(count)])
    a, b = _both(a, b, of_a, of_b)
    if a.dim() == 3:
        return torch.stack([multiply(x, y) for x, y in zip(a, b, strict=True)]) if pays(a[0], b[0]) else torch.bmm(a, b)
    result = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for c, x, y in zip(result, a, b, strict=True):
        torch.bmm(x, y, out=c)
    return result


def _accumulate(c, a, b, of_a, of_b):
    together = _as_one(a, b, of_a, of_b)
    if together is not None:
        c.add_(together)
        return
    if a.layout is not torch.strided or b.layout is not torch.strided:
        c.add_(_fresh(a, b, of_a, of_b))
        return
    a, b = _both(a, b, of_a, of_b)
    if a.dim() == 3 and not pays(a[0], b[0]):
        c.baddbmm_(a, b)
        return
    for into, x, y in zip(c, a, b, strict=True):
        _plain(x, y, into)


def _as_one(a, b, of_a, of_b):
    """A block of matrices times one matrix as one product, the block's rows or columns side by side; else None."""
    if (of_a and of_b) or a.dim() != 2 + of_a:
        return None
    if of_a:
        whole = a.is_contiguous() or a[0].numel() <= _FEW
        return multiply(a.flatten(0, 1), b).unflatten(0, a.shape[:2]) if whole else None
    columns = b.mT
    if not (columns.is_contiguous() or b[0].numel() <= _FEW):
        return None
    return multiply(a, columns.flatten(0, 1).t()).unflatten(1, columns.shape[:2]).movedim(1, 0)


def _both(a, b, of_a, of_b):
    """Both factors with a block in front."""
    return a if of_a else a.expand(len(b), *a.shape), b if of_b else b.expand(len(a), *b.shape)


# --- the block ------------------------------------------------------------------------------------------------------


def _batched(t):
    return _C.is_batchedtensor(t)


def _of_one_vmap(*batched):
    """Whether tensors that are batched belong to one vmap, around which there is none."""
    return all(_C.maybe_get_level(t) == 1 for t in batched)


def _physical(t):
    """The physical tensor of a batched one, the block its first dimension."""
    at, t = _C.maybe_get_bdim(t), _C.get_unwrapped(t)
    return t if at == 0 else t.movedim(at, 0)


def _level(*tensors):
    """The innermost vmap that a direction belongs to, counted from 1; 0 where there is none."""
    return max((_C.maybe_get_level(t) for t in tensors if t is not None and _batched(t)), default=0)


def _length(*tensors):
    """How many directions a block has: that of the innermost vmap."""
    level = _level(*tensors)
    return next(_C.get_unwrapped(t).size(_C.maybe_get_bdim(t)) for t in tensors if t is not None and _level(t) == level)


def _in_front(t, k, level=1):
    """The physical tensor, the block its first dimension."""
    if _level(t) != level:
        return t.expand(k, *t.shape)
    return _C.get_unwrapped(t).movedim(_C.maybe_get_bdim(t), 0)


def _aligned(t, k, dimensions):
    """The physical tensor, broadcastable against one of ``dimensions`` behind the block."""
    if not _batched(t):
        return t
    physical = _in_front(t, k)
    return physical.reshape(k, *[1] * (dimensions - t.dim()), *physical.shape[1:])
