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

_ADDING = ("add", "sub", "rsub", "cat", "stack", "mse_loss")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_OF_SHAPES = ("ones_like", "full_like")
_OF_WINDOWS = ("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_")


class Kind:
    """What is to be known of an operator.

    Attributes:
        name: its own.
        of_shapes: whether it looks at the shape of its argument alone, and its result is rarely written to.
        of_windows: whether it changes the shape of its argument in place, and none of its entries.
        adds: whether zeros among its arguments leave alone what depends on what.
        multiplies: the same if all of them but constants are parameters: a layer that is applied to data.
    """

    def __init__(self, func: OpOverload) -> None:
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_")
        self.name, self.of_shapes, self.adds = str(func), name in _OF_SHAPES, plain in _ADDING
        self.of_windows = name in _OF_WINDOWS
        self.multiplies, self._power = name in _PRODUCTS, plain == "pow"
        self._smooth = name in _SMOOTH or plain in _SMOOTH

    def smooth(self, args: Any) -> bool:
        """Whether it is smooth with these arguments."""
        if not self._power:
            return self._smooth
        return isinstance(args[1], (int, float)) and args[1] >= 1 and args[1] == int(args[1])


def kind_of(func: OpOverload) -> Kind:
    """Of an operator; found once."""
    known = _KINDS.get(id(func))
    if known is None:
        known = _KINDS[id(func)] = func, Kind(func)
    return known[1]


_KINDS: dict[int, tuple[OpOverload, Kind]] = {}  # by identity: operators are slow to hash
