"""Random operators: what is drawn comes from the generator that the evaluation set, and is never perturbed. Dropout:

    y = x * mask / (1 - p)      dy = dx * mask / (1 - p)

A sample of ``torch.normal`` is a constant, as it is for autograd; ``Normal.rsample`` follows mean and deviation.
"""

from __future__ import annotations

import torch

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
