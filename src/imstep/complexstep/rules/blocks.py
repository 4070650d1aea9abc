"""Sums of matrix products, in one output, for one direction or for a block of directions.

A block of k directions is replayed under ``torch.vmap``. PyTorch's own batching of a product copies matrices into
layouts that it can fold into one, and cannot add onto an output. Here the block is in front, and rows of a block times
a constant matrix are one product; other products are one batched kernel if small, else k of their own.
"""

from __future__ import annotations

import torch

from imstep.complexstep.gemm import multiply, multiply_onto, pays

_C = torch._C._functorch


def in_place(c, *others):
    """Whether ``c`` has room for what an operator with ``others`` adds to it: it has the batches that they have."""
    if not any(_C.is_batchedtensor(t) for t in others):
        return True
    return _C.is_batchedtensor(c) and _C.maybe_current_level() == 1


def product(a, b, onto=None):
    """a b, or onto + a b in the memory of ``onto``; matrices, or batches of them."""
    if not (_C.is_batchedtensor(a) or _C.is_batchedtensor(b)):
        return _plain(a, b, onto)
    if _C.maybe_current_level() != 1 or (onto is not None and not _C.is_batchedtensor(onto)):
        return torch.matmul(a, b) if onto is None else onto + torch.matmul(a, b)
    k = _length(a) if _C.is_batchedtensor(a) else _length(b)
    if onto is not None:
        _accumulate(_in_front(onto, k), a, b, k)
        return onto
    return _C._add_batch_dim(_fresh(a, b, k), 0, 1)


def addcmul_(c, a, b, value=1):
    """c + value a b entry by entry, in the memory of c where it has room."""
    if not in_place(c, a, b):
        return torch.addcmul(c, a, b, value=value)
    if not _C.is_batchedtensor(c):
        return c.addcmul_(a, b, value=value)
    # PyTorch has no batching rule for the operator in place.
    k, d = _length(c), c.dim()
    _in_front(c, k).addcmul_(_aligned(a, k, d), _aligned(b, k, d), value=value)
    return c


def _aligned(t, k, dimensions):
    """The physical tensor, broadcastable against one of ``dimensions`` behind the block."""
    if not _C.is_batchedtensor(t):
        return t
    physical = _in_front(t, k)
    return physical.reshape(k, *[1] * (dimensions - t.dim()), *physical.shape[1:])


def _plain(a, b, onto):
    if a.dim() == 2:
        return multiply(a, b) if onto is None else multiply_onto(onto, a, b)
    return torch.bmm(a, b) if onto is None else onto.baddbmm_(a, b)


def _fresh(a, b, k):
    """The physical product of matrices, or of batches of them."""
    rows_alone = not _C.is_batchedtensor(b)
    a, b = _in_front(a, k), _in_front(b, k)
    if a.dim() == 3:
        if rows_alone and a.is_contiguous():
            return multiply(a.flatten(0, 1), b[0]).unflatten(0, a.shape[:2])
        if pays(a[0], b[0]):
            return torch.stack([multiply(x, y) for x, y in zip(a, b, strict=True)])
        return torch.bmm(a, b)
    result = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for c, x, y in zip(result, a, b, strict=True):
        torch.bmm(x, y, out=c)
    return result


def _accumulate(c, a, b, k):
    a, b = _in_front(a, k), _in_front(b, k)
    if a.dim() == 3 and not pays(a[0], b[0]):
        c.baddbmm_(a, b)
        return
    for into, x, y in zip(c, a, b, strict=True):
        _plain(x, y, into)


def _length(t):
    return _C.get_unwrapped(t).size(_C.maybe_get_bdim(t))


def _in_front(t, k):
    """The physical tensor, the block its first dimension."""
    if not _C.is_batchedtensor(t):
        return t.expand(k, *t.shape)
    return _C.get_unwrapped(t).movedim(_C.maybe_get_bdim(t), 0)
