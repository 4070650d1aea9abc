"""Bags of embeddings: sums, means or maxima of rows w[k], weighted by s.

    y = sum s_k w[k]      dy = sum s_k dw[k] + ds_k w[k];      maximum: dy = dw[argmax]

The backward operators are bilinear in the gradient and in s, or in the gradient and in w.
"""

from __future__ import annotations

import torch

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.registry import defined_as, multilinear, rule
from imstep.complexstep.rules.forms import plus

aten = torch.ops.aten

_MEAN, _MAX = 1, 2


def _shares(indices, bag, bags, mode, s, padding):
    """What each row counts in its bag, (N,)."""
    kept = indices != padding
    if mode == _MEAN:
        counts = torch.zeros(bags, dtype=torch.long, device=bag.device).index_add(0, bag, kept.long())
        return kept / counts.clamp(min=1)[bag]
    return kept if s is None else kept * s


def _bag_of(indices, offsets):
    """The bag that each index is in, (N,); the kernel leaves it out where it can do without."""
    places = torch.arange(indices.numel(), device=indices.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True).to(indices.dtype) - 1


def _bag(op):
    def forward(w, indices, offsets, by_freq=False, mode=0, sparse=False, s=None, include_last=False, padding=-1):
        outputs = op(w, indices, offsets, by_freq, mode, sparse, s, include_last, padding)

        def total(table, s):
            """By operators that blocks of directions are batched over, which the kernel is not."""
            bag, bags = _bag_of(indices, offsets), len(outputs[0])
            rows = table.index_select(0, indices) * _shares(indices, bag, bags, mode, s, padding).to(table)[:, None]
            return rows.new_zeros(bags, table.shape[1]).index_add(0, bag, rows)

        def push(dw, _, __, ds):
            dy = None
            if dw is not None and mode == _MAX:
                filled = (outputs[2] > 0).unsqueeze(-1)
                dy = dw.gather(0, outputs[3].clamp(min=0)) * filled
            elif dw is not None:
                dy = total(dw, s)
            if ds is not None:
                dy = plus(dy, total(w, ds))
            return dy, None, None, None

        return outputs, push

    return forward


rule(aten._embedding_bag.default, family="multilinear")(_bag(aten._embedding_bag))
rule(aten._embedding_bag_forward_only.default, family="multilinear")(_bag(aten._embedding_bag_forward_only))
multilinear(aten._embedding_bag_per_sample_weights_backward.default, factors=(0, 1))


@rule(aten._embedding_bag_dense_backward.default, family="multilinear")
def embedding_bag_backward(g, indices, bag, size, maxima, rows, by_freq, mode, s, padding=-1):
    kernel = lambda g, s: aten._embedding_bag_dense_backward(
        g, indices, bag, size, maxima, rows, by_freq, mode, s, padding
    )

    def scatter(g, s):
        if mode == _MAX or by_freq:
            return kernel(g, s)
        shares = _shares(indices, bag, len(g), mode, s, padding).to(g)
        return g.new_zeros(rows, g.shape[1]).index_add(0, indices, g.index_select(0, bag) * shares[:, None])

    def push(dg, _, __, ___, ____, ds):
        first = None if dg is None else scatter(dg, s)
        return first if ds is None else plus(first, scatter(g, ds))

    return kernel(g, s), push


@defined_as(aten._embedding_bag_backward.default)
def embedding_bag_backward_of_any_layout(
    g, indices, offsets, bag, size, maxima, rows, by_freq, mode, sparse, s, padding=-1
):
    if sparse:
        raise UnsupportedOperatorError(
            aten._embedding_bag_backward.default, "a sparse gradient carries no imaginary part.", "Use sparse=False."
        )
    if bag.numel() == 0:
        bag = _bag_of(indices, offsets)
    return aten._embedding_bag_dense_backward(g, indices, bag, size, maxima, rows, by_freq, mode, s, padding)


@defined_as(aten.embedding_renorm.default)
def embedding_renorm(w, indices, max_norm, norm_type=2.0):
    """Nothing to do where no row is longer than allowed; else it overwrites what is being differentiated."""
    if bool((torch.linalg.vector_norm(w[indices.reshape(-1)], norm_type, -1) > max_norm).any()):
        raise UnsupportedOperatorError(
            "embedding_renorm",
            "an embedding with max_norm overwrites the rows of its table that are longer, while they are looked up.",
            "Leave max_norm out; look up table.renorm(2, 0, max_norm) in the closure, or shorten rows after the step.",
        )
    return w.clone()
