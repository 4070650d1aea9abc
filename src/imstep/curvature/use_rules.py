"""What each operator does with a parameter: which rows make up its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep import lstm_layer, rnn_layer
from imstep.complexstep.islands import plain


@dataclass(frozen=True, eq=False)
class Rows:
    """What a use adds to the gradient of its parameter, row by row.

    Attributes:
        left: (R, out); for a parameter that is a vector, or used as one, the addends themselves, (R, entries).
        right: (R, in), where the addends are the outer products of left and right; else None.
    """

    left: Tensor
    right: Tensor | None

    @property
    def size(self) -> float:
        """The sum of the norms of the addends."""
        norms = torch.linalg.vector_norm(self.left, dim=1, dtype=torch.float64)
        if self.right is not None:
            norms = norms * torch.linalg.vector_norm(self.right, dim=1, dtype=torch.float64)
        return float(norms.sum())


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter.

    Attributes:
        parameter: position among the parameters.
        edge: where autograd's graph leaves the use.
        spread: from the gradient at that edge to its rows, (R, k).
        other: the rows (R, l) that they form outer products with; None where they are the addends themselves.
        transposed: whether those outer products are other ⊗ spread rather than spread ⊗ other.
        member: of a stack of layers, whose parameter has one slice for each, which layer it is, and of how many.
        lone: whether it is a vector that is added to, or multiplies, a batch of one row: that row may be of one
            residual, as a layer's is at a single point, or its entries of one each.
    """

    parameter: int
    edge: GradientEdge
    spread: Callable[[Tensor], Tensor]
    other: Callable[[], Tensor] | None = None
    transposed: bool = False
    member: tuple[int, int] = (0, 1)
    lone: bool = False

    def rows(self, spread: Tensor) -> Rows:
        """The addends for the rows of a gradient."""
        if self.other is None:
            return Rows(spread, None)
        other = self.other()
        return Rows(other, spread) if self.transposed else Rows(spread, other)


@dataclass(frozen=True, eq=False)
class Operand:
    """An argument of an operator that is a parameter, or the transpose of one.

    Attributes:
        node: of autograd's graph.
        at: which of its arguments.
        transposed: whether it is the parameter's transpose.
        shape: of the parameter.
        parameter: its position.
        stacked: whether it is (E, n), seen as (E, 1, n).
    """

    node: Any
    at: int
    transposed: bool
    shape: torch.Size
    parameter: int
    stacked: bool = False

    @property
    def edge(self) -> GradientEdge:
        """Where the graph leaves the operator."""
        return GradientEdge(self.node, 0)


Found = Use | list[Use] | None
"""How a parameter is used in an operator; None where that cannot be told."""


def _mm(p: Operand) -> Use:
    return _product(p, p.at, lambda: plain(p.node._saved_mat2 if p.at == 0 else p.node._saved_self), 1)


def _addmm(p: Operand) -> Found:
    if p.at == 0:
        return _broadcast(p, lambda d: _times(p.node._saved_beta, d))
    other = lambda: plain(p.node._saved_mat2 if p.at == 1 else p.node._saved_mat1)
    return _product(p, p.at - 1, other, p.node._saved_alpha)


def _product(p: Operand, at: int, other: Callable[[], Tensor], factor: Any) -> Use:
    """One factor of a matrix product: the gradient of the first is d otherᵀ, of the second otherᵀ d."""
    if at == 0:
        return Use(p.parameter, p.edge, lambda d: _times(factor, d.mT), lambda: other().detach().mT, p.transposed)
    return Use(p.parameter, p.edge, lambda d: _times(factor, d), lambda: other().detach(), not p.transposed)


def _bmm(p: Operand) -> list[Use] | None:
    """A stack of matrix products: each member's slice has the rows that it multiplies."""
    first, second = p.node._saved_self, p.node._saved_mat2
    other = second if p.at == 0 else first
    if p.stacked or other is None or len(p.shape) != 3:
        return None
    members, transposed, uses = p.shape[0], p.transposed != (p.at == 1), []
    for e in range(members):
        if p.at == 0:
            spread, rows = (lambda d, e=e: d[e].mT), (lambda e=e: other[e].detach().mT)
        else:
            spread, rows = (lambda d, e=e: d[e]), (lambda e=e: other[e].detach())
        uses.append(Use(p.parameter, p.edge, spread, rows, transposed, (e, members)))
    return uses


def _stacked_rows(p: Operand, addends: Callable[[Tensor], Tensor]) -> list[Use] | None:
    """A vector for each member of a stack, added to all of its rows: (E, 1, n) to (E, R, n)."""
    shape, members = p.node._input_metadata[0].shape, p.shape[0]
    if p.transposed or len(shape) != 3 or shape[0] != members or shape[2] != p.shape[1]:
        return None
    return [
        Use(p.parameter, p.edge, lambda d, e=e: addends(d)[e], member=(e, members))  # type: ignore[misc]
        for e in range(members)
    ]


def _sum(p: Operand) -> Found:
    sign = 1 if p.at == 0 else p.node._saved_alpha
    return _broadcast(p, lambda d: _times(sign, d))


def _difference(p: Operand) -> Found:
    sign = 1 if p.at == 0 else -p.node._saved_alpha
    return _broadcast(p, lambda d: _times(sign, d))


def _mul(p: Operand) -> Found:
    other = p.node._saved_other if p.at == 0 else p.node._saved_self
    return None if other is None else _broadcast(p, lambda d: plain(other).detach() * d)


def _div(p: Operand) -> Found:
    below = lambda: plain(p.node._saved_other).detach()
    if p.at == 0:
        return _broadcast(p, lambda d: d / below())
    return _broadcast(p, lambda d: -d * plain(p.node._saved_self).detach() / below().square())


def _expand(p: Operand) -> Found:
    return _broadcast(p, lambda d: d)


def _repeat(p: Operand) -> Found:
    """Copies one after the other; along the first dimension and those before it, they are rows."""
    if p.transposed or p.stacked or any(n != 1 for n in p.node._saved_repeats[::-1][: len(p.shape) - 1]):
        return None
    return Use(p.parameter, p.edge, lambda d: d.reshape(-1, p.shape.numel()))


def _layer_norm(p: Operand) -> Found:
    node = p.node
    if p.at == 0:
        return None
    if p.at == 2:
        return _broadcast(p, lambda d: d)
    centred = lambda: plain(node._saved_input).detach() - node._saved_result1
    return _broadcast(p, lambda d: d * centred() * node._saved_result2)


def _layer_norm_backward(p: Operand) -> Found:
    """A normalisation's gradient with respect to its input: symmetric in what it makes of grad_out · weight."""
    node = p.node
    if p.at == 5:
        return []  # the shift has no part in it
    if p.at != 4:
        return None

    def addends(d: Tensor) -> Tensor:
        over = tuple(range(-len(node._saved_normalized_shape), 0))
        rate = node._saved_rstd
        normal = (plain(node._saved_input).detach() - node._saved_mean) * rate
        along = d - d.mean(over, keepdim=True) - normal * (d * normal).mean(over, keepdim=True)
        return plain(node._saved_grad_out).detach() * rate * along

    return _broadcast(p, addends)


def _prelu(p: Operand) -> Found:
    return None if p.at == 0 else _broadcast(p, lambda d: d * plain(p.node._saved_self).detach().clamp(max=0))


def _mv(p: Operand) -> Found:
    """A matrix times a vector: the rows of a parameter that is the vector are those of the matrix."""
    matrix, vector = p.node._saved_self, p.node._saved_vec
    if p.at == 0:
        return Use(p.parameter, p.edge, lambda d: d[None], lambda: plain(vector).detach()[None], p.transposed)
    return Use(p.parameter, p.edge, lambda d: d[:, None] * plain(matrix).detach())


def _dot(p: Operand) -> Found:
    other = p.node._saved_tensor if p.at == 0 else p.node._saved_self
    return Use(p.parameter, p.edge, lambda d: (d * plain(other).detach())[None])


def _broadcast(p: Operand, addends: Callable[[Tensor], Tensor]) -> Found:
    """A parameter that is broadcast: the addends are rows over the dimensions along which it is.

    Where it is not, one row would belong to many residuals.
    """
    if p.stacked:
        return _stacked_rows(p, addends)
    shape = p.node._input_metadata[0].shape
    lone = math.prod(shape) == p.shape.numel()
    if p.transposed or (lone and len(shape) <= len(p.shape)):
        return None

    def spread(d: Tensor) -> Tensor:
        shape = (1,) * (d.ndim - len(p.shape)) + tuple(p.shape)
        repeated = [i for i, n in enumerate(shape) if n == 1]
        own = [i for i, n in enumerate(shape) if n != 1]
        return addends(d).permute(*repeated, *own).reshape(-1, p.shape.numel())

    return Use(p.parameter, p.edge, spread, lone=lone)


def _batch_norm(p: Operand) -> Found:
    """Scale and shift of channels; by the running statistics, since those of the batch are of all residuals."""
    node = p.node
    if p.at == 0 or node._saved_training:
        return None
    if p.at == 2:
        return _channels(p, lambda d: d)
    shape = (-1, *(1,) * (len(node._input_metadata[0].shape) - 2))
    mean, var = (plain(t).detach().view(shape) for t in (node._saved_running_mean, node._saved_running_var))
    return _channels(p, lambda d: d * (plain(node._saved_input).detach() - mean) * (var + node._saved_eps).rsqrt())


def _group_norm(p: Operand) -> Found:
    node = p.node
    if p.at == 0:
        return None
    if p.at == 2:
        return _channels(p, lambda d: d)

    def addends(d: Tensor) -> Tensor:
        grouped = plain(node._saved_input).detach().reshape(node._saved_N, node._saved_group, -1)
        normal = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
        return d * normal.view_as(d)

    return _channels(p, addends)


def _channels(p: Operand, addends: Callable[[Tensor], Tensor]) -> Found:
    """A number for each channel, the second dimension."""
    if p.transposed or p.stacked:
        return None
    return Use(p.parameter, p.edge, lambda d: addends(d).movedim(1, -1).reshape(-1, p.shape[0]))


def _convolution(p: Operand) -> Found:
    node, kernel, groups = p.node, p.shape[2:], p.node._saved_groups
    if p.at == 2:
        return Use(p.parameter, p.edge, lambda d: d.movedim(1, -1).reshape(-1, d.shape[1]))
    if p.at != 1 or p.transposed or p.stacked:
        return None
    settings = node._saved_padding, node._saved_stride, node._saved_dilation
    patches = lambda t: _patches(t, kernel, *settings)
    at_places = lambda t: t.movedim(1, -1).reshape(-1, t.shape[1])
    # Transposed, each input is multiplied by the weight onto a patch of the output; else each patch of the input.
    of_input, of_output = (at_places, patches) if node._saved_transposed else (patches, at_places)
    uses = []
    for g in range(groups):
        part = lambda t, g=g: t.chunk(groups, 1)[g]
        spread = lambda d, part=part: of_output(part(d))
        other = lambda part=part: of_input(part(plain(node._saved_input).detach()))
        uses.append(Use(p.parameter, p.edge, spread, other, node._saved_transposed, (g, groups)))
    return uses


def _patches(
    t: Tensor, kernel: Sequence[int], padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution's kernel meets at each place: (places, channels and entries of the kernel)."""
    t = F.pad(t, [n for fill in reversed(padding) for n in (fill, fill)])
    for at, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        t = t.unfold(at, (size - 1) * apart + 1, step)[..., ::apart]
    return t.movedim(1, 1 + len(kernel)).reshape(-1, t.shape[1] * math.prod(kernel))


def _recurrent(p: Operand) -> Found:
    """The weight of the states in a layer that is one operator: the gradient that reaches the inputs is of its gates.
    """
    own = getattr(p.node, "_forward_cls", None)
    inputs, number = p.node.next_functions[0]
    if own not in (lstm_layer.Layer, rnn_layer.Layer) or p.at != own.WEIGHT or inputs is None:
        return None
    states = lambda: own.states(p.node).detach().flatten(0, 1)
    return Use(p.parameter, GradientEdge(inputs, number), lambda d: d.flatten(0, 1), states, p.transposed)


def _embedding(p: Operand) -> Found:
    node = p.node
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    index = lambda: plain(node._saved_indices).detach()
    return _looked_up(p, p.shape[:1], index, left_out=signed(node._saved_padding_idx)[0])


def _index_select(p: Operand) -> Found:
    if signed(p.node._saved_dim)[0] % len(p.shape):
        return None
    return _looked_up(p, p.shape[:1], lambda: plain(p.node._saved_index).detach())


def _index(p: Operand) -> Found:
    """A table that is looked up in its first dimensions."""
    saved = [None if t is None else plain(t) for t in p.node._saved_indices]
    count = sum(t is not None for t in saved)
    if any(t is None or t.dtype not in (torch.int64, torch.int32) for t in saved[:count]):
        return None
    sizes = p.shape[:count]

    def index() -> Tensor:
        one, *others = (t.detach().long() % n for t, n in zip(saved, sizes, strict=False) if t is not None)
        for t, n in zip(others, sizes[1:], strict=True):
            one = one * n + t
        return one

    return _looked_up(p, sizes, index)


def _looked_up(p: Operand, sizes: Sequence[int], index: Callable[[], Tensor], left_out: int = -1) -> Found:
    """Entries of a table, (*sizes, ...), at the places that ``index`` says: those at ``left_out`` have no gradient."""
    if p.transposed or p.stacked:
        return None
    rest = math.prod(p.shape[len(sizes) :])

    def places() -> Tensor:
        at = index().reshape(-1)
        hot = F.one_hot(at, math.prod(sizes)) * (at != left_out)[:, None]
        return hot.to(p.node._input_metadata[0].dtype)

    return Use(p.parameter, p.edge, lambda d: d.reshape(-1, rest), places, transposed=True)


def _trilinear(p: Operand) -> Found:
    """A factor of Σ i1 i2 i3, each with dimensions added along which it is expanded; all rows are along the first."""
    node = p.node
    expanded = [list(node._saved_expand1), list(node._saved_expand2), list(node._saved_expand3)]
    if p.transposed or p.stacked or expanded[p.at] != [0]:
        return None

    def addends(d: Tensor) -> Tensor:
        whole = _unsqueezed(d, node._saved_sumdim)
        for at, t in enumerate((node._saved_i1, node._saved_i2, node._saved_i3)):
            if at != p.at:
                whole = whole * _unsqueezed(plain(t).detach(), expanded[at])
        return whole.expand(-1, *p.shape).flatten(1)

    return Use(p.parameter, p.edge, addends)


def _unsqueezed(t: Tensor, dims: Sequence[int]) -> Tensor:
    """With dimensions of length 1 at some places of the result."""
    for dim in sorted(dims):
        t = t.unsqueeze(dim)
    return t


def signed(*numbers: int) -> list[int]:
    """Dimensions and places as autograd keeps them: negative ones as unsigned."""
    return [n - 2**64 if n >= 2**63 else n for n in numbers]


def _times(factor: Any, d: Tensor) -> Tensor:
    return d if factor == 1 else factor * d


RULES: dict[str, Callable[[Operand], Found]] = {
    "MmBackward0": _mm,
    "BmmBackward0": _bmm,
    "AddmmBackward0": _addmm,
    "AddBackward0": _sum,
    "SubBackward0": _difference,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
    "RepeatBackward0": _repeat,
    "MvBackward0": _mv,
    "DotBackward0": _dot,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeLayerNormBackwardBackward0": _layer_norm_backward,
    "PreluKernelBackward0": _prelu,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "ConvolutionBackward0": _convolution,
    "LayerBackward": _recurrent,
    "EmbeddingBackward0": _embedding,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "TrilinearBackward0": _trilinear,
}
"""For each operator, what tells how a parameter is used in it; None where it cannot tell."""
