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

_MAX = 2


def _bag(op):
    def forward(w, indices, offsets, by_freq=False, mode=0, sparse=False, s=None, include_last=False, padding=-1):
        arrangement = (indices, offsets, by_freq, mode, sparse)
        outputs = op(w, *arrangement, s, include_last, padding)

        def push(dw, _, __, ds):
            dy = None
            if dw is not None and mode == _MAX:
                filled = (outputs[2] > 0).unsqueeze(-1)
                dy = dw.gather(0, outputs[3].clamp(min=0)) * filled
            elif dw is not None:
                dy = op(dw, *arrangement, s, include_last, padding)[0]
            if ds is not None:
                dy = plus(dy, op(w, *arrangement, ds, include_last, padding)[0])
            return dy, None, None, None

        return outputs, push

    return forward


rule(aten._embedding_bag.default, family="multilinear")(_bag(aten._embedding_bag))
rule(aten._embedding_bag_forward_only.default, family="multilinear")(_bag(aten._embedding_bag_forward_only))
multilinear(aten._embedding_bag_per_sample_weights_backward.default, factors=(0, 1))


@rule(aten._embedding_bag_dense_backward.default, family="multilinear")
def embedding_bag_backward(g, indices, bag, size, maxima, rows, by_freq, mode, s, padding=-1):
    scatter = lambda g, s: aten._embedding_bag_dense_backward(
        g, indices, bag, size, maxima, rows, by_freq, mode, s, padding
    )

    def push(dg, _, __, ___, ____, ds):
        first = None if dg is None else scatter(dg, s)
        return first if ds is None else plus(first, scatter(g, ds))

    return scatter(g, s), push


@defined_as(aten._embedding_bag_backward.default)
def embedding_bag_backward_of_any_layout(
    g, indices, offsets, bag, size, maxima, rows, by_freq, mode, sparse, s, padding=-1
):
    if sparse:
        raise UnsupportedOperatorError(
            aten._embedding_bag_backward.default, "a sparse gradient carries no imaginary part.", "Use sparse=False."
        )
    if bag.numel() == 0:  # the kernel leaves it out where it can do without
        places = torch.arange(indices.numel(), device=indices.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets, places, right=True).to(indices.dtype) - 1
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
