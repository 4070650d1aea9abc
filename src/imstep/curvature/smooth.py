"""Operators that are smooth: with finite values come finite derivatives, which vanish nowhere but at single points."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

_SMOOTH = {
    *("add", "sub", "rsub", "mul", "div", "neg", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "addcmul"),
    *("sum", "mean", "cumsum", "mse_loss", "mse_loss_backward"),
    *("tanh", "tanh_backward", "sin", "cos", "exp", "expm1", "sinh", "cosh", "atan", "asinh", "erf", "sigmoid"),
    *("sigmoid_backward", "silu", "silu_backward", "gelu", "gelu_backward", "softplus", "softplus_backward"),
    *("mish", "mish_backward", "log", "log1p", "reciprocal", "native_layer_norm", "native_layer_norm_backward"),
    *("cat", "stack", "clone", "_to_copy", "copy", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros"),
    *("new_empty", "new_full", "new_ones", "fill", "zero", "index", "index_select", "gather", "scatter_add"),
    *("index_add", "index_put", "_index_put_impl", "select_backward", "slice_backward", "unfold_backward"),
    *("_unsafe_view", "repeat", "flip", "roll", "tril", "triu", "diagonal_backward", "constant_pad_nd"),
}
"""By name, in place or not."""


def is_smooth(func: OpOverload, args: Any) -> bool:
    """Whether an operator is."""
    name = func.overloadpacket.__name__
    if name in ("pow", "pow_"):
        exponent = args[1]
        return isinstance(exponent, (int, float)) and exponent >= 1 and exponent == int(exponent)
    return name in _SMOOTH or name.removesuffix("_") in _SMOOTH


def ignores_zeros(func: OpOverload, of_parameters: bool) -> bool:
    """Whether zeros among its constant arguments leave alone what depends on what.

    Args:
        of_parameters: whether its other arguments are parameters: then a matrix product is a layer applied to data.
    """
    name = func.overloadpacket.__name__
    return name.removesuffix("_") in _ADDING or (of_parameters and name in _PRODUCTS)


_ADDING = ("add", "sub", "rsub", "cat", "stack", "mse_loss")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
