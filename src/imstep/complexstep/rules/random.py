"""Random operators: what is drawn comes from the generator that the evaluation set, and is never perturbed. Dropout:

    y = x * mask / (1 - p)      dy = dx * mask / (1 - p)

A sample y of a gamma or Dirichlet distribution follows its concentration a where its distribution function stays,

    F(y; a) = const      dy = -F_a / F_y da

by kernels of PyTorch's that have no derivative of their own. A sample of ``torch.normal`` is a constant, as it is for
autograd; ``Normal.rsample`` follows mean and deviation.
"""

from __future__ import annotations

import torch

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.registry import constant, exact, linear, rule

aten = torch.ops.aten

linear(aten.native_dropout_backward.default)
constant(aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)


@rule(aten.native_dropout.default, family="random", finite=exact)
def native_dropout(x, p, train):
    y, mask = aten.native_dropout(x, p, train)
    if train is False or p == 0:
        return (y, mask), lambda dx: (dx, None)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return (y, mask), lambda dx: (aten.native_dropout_backward(dx, mask, scale), None)


@rule(aten._standard_gamma.default, family="random")
def standard_gamma(concentration, generator=None):
    y = aten._standard_gamma(concentration, generator)
    slope = aten._standard_gamma_grad(concentration, y)
    return y, lambda da: da * slope


@rule(aten._sample_dirichlet.default, family="random")
def sample_dirichlet(concentration, generator=None):
    """The transpose of what ``torch.distributions.Dirichlet`` does to a gradient."""
    y = aten._sample_dirichlet(concentration, generator)
    slope = aten._dirichlet_grad(y, concentration, concentration.sum(-1, True).expand_as(concentration))

    def push(da):
        change = da * slope
        return change - y * change.sum(-1, True)

    return y, push


def _refused(op, reason, remedy):
    def refuse(*args, **kwargs):
        raise UnsupportedOperatorError(op, reason, remedy)

    rule(op, family="random")(refuse)


for op in (aten._standard_gamma_grad.default, aten._dirichlet_grad.default):
    _refused(
        op,
        "second derivatives of a sample by its concentration, or by degrees of freedom, are not known, in PyTorch "
        "either.",
        "Keep those constant, as by detach(), or take LeastSquares, which needs first derivatives alone.",
    )
_refused(aten.binomial.default, "a count has no derivative, in PyTorch either.", "Draw it of p.detach().")
