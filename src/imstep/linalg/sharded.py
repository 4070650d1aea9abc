"""Vectors of which each process holds a part; inner products are sums over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class Cut(Protocol):
    """How the n entries of a vector are divided among processes.

    Attributes:
        size: n.
    """

    size: int

    def own(self, whole: Tensor) -> Tensor:
        """The entries of this process of (..., n)."""

    def join(self, own: Tensor) -> Tensor:
        """The inverse of :meth:`own`: (..., n) in every process, which all call together."""

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes, the same bits in all of them."""


class ShardedTensor(Tensor):
    """A vector (n,), or a block (k, n) or (n, k), of which this process holds the entries of a cut.

    It stands where an algorithm expects a tensor of that shape. What works entry by entry costs no communication;
    inner products are formed locally and added up, and are plain tensors. A plain tensor of the same extent, which must
    be the same in all processes, is cut where it meets one. All else is refused.

    Args:
        own: the entries of this process.
        cut: how they are divided.
        dim: which dimension of ``own`` is cut.
    """

    _own: Tensor
    _cut: Cut
    _dim: int

    @staticmethod
    def __new__(cls, own: Tensor, cut: Cut, dim: int = -1) -> ShardedTensor:
        dim %= own.ndim
        shape = [*own.shape[:dim], cut.size, *own.shape[dim + 1 :]]
        made: ShardedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)
        made._own, made._cut, made._dim = own, cut, dim
        return made

    @property
    def own(self) -> Tensor:
        """The entries of this process."""
        return self._own

    @property
    def cut(self) -> Any:
        """How they are divided."""
        return self._cut

    def whole(self) -> Tensor:
        """All entries, in every process; all call this together."""
        return self._cut.join(self._own.movedim(self._dim, -1)).movedim(-1, self._dim)

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """Inner products of pairs of vectors (n,), computed in ``dtype``, by one sum over the processes."""
        locals_ = [torch.dot(_matched(a, self).to(dtype), _matched(b, self).to(dtype)) for a, b in pairs]
        return self._cut.total(torch.stack(locals_))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedTensor(shape={tuple(self.shape)}, own={self._own.numel():,} entries, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None and torch.Tag.pointwise in func.tags and "out" not in kwargs:
            rule = _entrywise
        result = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if result is NotImplemented:
            raise NotImplementedError(
                f"{func} has no rule for vectors that are sharded over processes, so that what asked for it works on "
                "whole vectors only. Take the default solver, preconditioning and step search of NewtonKrylov; or keep "
                "the whole model in every process, without fully_shard, and pass process_group= all the same."
            )
        return result


def _matched(t: Tensor, like: ShardedTensor) -> Tensor:
    """The own entries of a vector that is sharded as ``like``, or whole."""
    return t._own if isinstance(t, ShardedTensor) else like._cut.own(t)


def own_entries(t: Tensor) -> Tensor:
    """What of a tensor is held here, in the same memory."""
    return t._own if isinstance(t, ShardedTensor) else t


def in_whole(t: Tensor) -> Tensor:
    """All entries, in every process; all call this together."""
    return t.whole() if isinstance(t, ShardedTensor) else t


def summed_over_rows(first: Tensor, second: Tensor, local: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What ``local`` adds up over the entries of rows (k, n) and (m, n), in stretches of its own."""
    known = next((t for t in (first, second) if isinstance(t, ShardedTensor)), None)
    if known is None:
        return local(first, second)
    return known._cut.total(local(_matched(first, known), _matched(second, known)))


_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


# --- entry by entry -------------------------------------------------------------------------------------------------


@_rule(aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.detach.default, aten.clone.default)
@_rule(aten.alias.default, aten._to_copy.default, aten.zeros_like.default, aten.ones_like.default)
@_rule(aten.empty_like.default, aten.full_like.default)
def _entrywise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What works on each entry alone, with dimensions aligned from the last one as in broadcasting."""
    found = [t for t in _tensors([*args, *kwargs.values()]) if isinstance(t, ShardedTensor)]
    cut, back = found[0]._cut, found[0]._dim - found[0].ndim  # of the dimension that is cut, from the end
    if any(t._dim - t.ndim != back for t in found):
        return NotImplemented

    def local(t: Tensor) -> Tensor:
        if isinstance(t, ShardedTensor):
            return t._own
        if t.ndim < -back or t.shape[back] == 1:
            return t
        return cut.own(t.movedim(back, -1)).movedim(-1, back)

    if func._schema.is_mutable:
        if not isinstance(args[0], ShardedTensor):
            return NotImplemented
        func(*tree_map_only(Tensor, local, args), **tree_map_only(Tensor, local, kwargs))
        return args[0]
    kwargs.pop("memory_format", None)
    result = func(*tree_map_only(Tensor, local, args), **tree_map_only(Tensor, local, kwargs))
    return ShardedTensor(result, cut, back)


def _tensors(nested: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for a in nested:
        found += [a] if isinstance(a, Tensor) else _tensors(a) if isinstance(a, (list, tuple)) else []
    return found


@_rule(aten.new_empty.default, aten.new_zeros.default)
def _new(func: Any, t: ShardedTensor, size: Sequence[int], **kwargs: Any) -> Any:
    """A plain tensor where no dimension is that of the vectors; of several that are the last one is cut."""
    where = [at for at, extent in enumerate(size) if extent == t._cut.size]
    if not where:
        return func(t._own, size, **kwargs)
    own = [t._own.shape[t._dim] if at == where[-1] else extent for at, extent in enumerate(size)]
    return ShardedTensor(func(t._own, own, **kwargs), t._cut, where[-1])


# --- other views of the same entries --------------------------------------------------------------------------------


@_rule(aten.t.default, aten.transpose.int)
def _transpose(func: Any, t: ShardedTensor, *dims: int) -> ShardedTensor:
    if t.ndim < 2:
        return ShardedTensor(t._own, t._cut, t._dim)
    first, second = (d % t.ndim for d in dims or (0, 1))
    swapped = {first: second, second: first}
    return ShardedTensor(t._own.transpose(first, second), t._cut, swapped.get(t._dim, t._dim))


@_rule(aten.unsqueeze.default)
def _unsqueeze(func: Any, t: ShardedTensor, dim: int) -> ShardedTensor:
    dim %= t.ndim + 1
    return ShardedTensor(t._own.unsqueeze(dim), t._cut, t._dim + (dim <= t._dim))


@_rule(aten.squeeze.dim, aten.select.int)
def _select(func: Any, t: ShardedTensor, dim: int, *index: int) -> Any:
    dim %= t.ndim
    if dim == t._dim:
        return NotImplemented
    kept = not index and t.shape[dim] != 1
    return ShardedTensor(func(t._own, dim, *index), t._cut, t._dim - (dim < t._dim and not kept))


@_rule(aten.index.Tensor)
def _picked(func: Any, t: Tensor, index: Sequence[Tensor | None]) -> Any:
    """Rows of a block by their numbers."""
    if not isinstance(t, ShardedTensor) or any(i is not None for i in index[1:]) or t._dim == 0:
        return NotImplemented
    return ShardedTensor(func(t._own, index), t._cut, t._dim + (index[0].ndim - 1 if index[0] is not None else 0))


@_rule(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _along(func: Any, t: ShardedTensor, *args: Any, **kwargs: Any) -> Any:
    """Parts of a block, each with all of the entries of its vectors."""
    first = 1 if func in (aten.split.Tensor, aten.split_with_sizes.default) else 0
    dim = (args[first] if len(args) > first else kwargs.get("dim", 0)) % t.ndim
    if dim == t._dim:
        return NotImplemented
    result, at = func(t._own, *args, **kwargs), t._dim - (func is aten.unbind.int and dim < t._dim)
    if isinstance(result, Tensor):
        return ShardedTensor(result, t._cut, at)
    return [ShardedTensor(part, t._cut, at) for part in result]


@_rule(aten.stack.default, aten.cat.default)
def _joined(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = next(t for t in tensors if isinstance(t, ShardedTensor))
    dim %= first.ndim + (func is aten.stack.default)
    if any(not isinstance(t, ShardedTensor) or t._dim != first._dim for t in tensors):
        return NotImplemented
    if func is aten.cat.default and dim == first._dim:
        return NotImplemented
    own = func([t._own for t in tensors if isinstance(t, ShardedTensor)], dim)
    return ShardedTensor(own, first._cut, first._dim + (func is aten.stack.default and dim <= first._dim))


# --- sums over entries ----------------------------------------------------------------------------------------------


@_rule(aten.dot.default, aten.mv.default, aten.mm.default)
def _product(func: Any, first: Tensor, second: Tensor) -> Any:
    """Products of vectors and matrices: a sum over the processes where the dimension that is summed is cut."""
    inner = first.ndim - 1
    cut = next(t for t in (first, second) if isinstance(t, ShardedTensor))._cut
    by = [t for t, at in ((first, inner), (second, 0)) if isinstance(t, ShardedTensor) and t._dim == at]
    across = [t for t in (first, second) if isinstance(t, ShardedTensor) and not any(t is other for other in by)]
    if by and across:
        return NotImplemented
    if by:
        own = [t._own if isinstance(t, ShardedTensor) else t for t in (first, second)]
        if not isinstance(first, ShardedTensor):
            own[0] = cut.own(first)
        if not isinstance(second, ShardedTensor):
            own[1] = cut.own(second.movedim(0, -1)).movedim(-1, 0)
        return cut.total(func(*own))
    if len(across) > 1:
        return NotImplemented
    own = [t._own if isinstance(t, ShardedTensor) else t for t in (first, second)]
    return ShardedTensor(func(*own), cut, 0 if across[0] is first else -1)


@_rule(aten.addmm.default)
def _added(func: Any, t: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * t + alpha * torch.mm(first, second)


@_rule(aten.sum.default)
def _sum(func: Any, t: ShardedTensor, **kwargs: Any) -> Tensor:
    return t._cut.total(func(t._own, **kwargs))


@_rule(aten.mean.default)
def _mean(func: Any, t: ShardedTensor, **kwargs: Any) -> Tensor:
    return t._cut.total(t._own.sum(**kwargs)) / t.numel()


@_rule(aten.sum.dim_IntList)
def _sum_along(func: Any, t: ShardedTensor, dim: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    dims = [d % t.ndim for d in dim or range(t.ndim)]
    if keepdim:
        return NotImplemented
    return _reduced(t, func(t._own, dims, False, **kwargs), dims)


@_rule(aten.mean.dim)
def _mean_along(func: Any, t: ShardedTensor, dim: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    summed = _sum_along(aten.sum.dim_IntList, t, dim, keepdim, **kwargs)
    return summed if summed is NotImplemented else summed / math.prod(t.shape[d] for d in dim or range(t.ndim))


def _reduced(t: ShardedTensor, local: Tensor, dims: Sequence[int]) -> Tensor:
    """What sums over dimensions come to, from those of this process."""
    if t._dim in dims:
        return t._cut.total(local)
    return ShardedTensor(local, t._cut, t._dim - sum(d < t._dim for d in dims))


@_rule(aten.linalg_vector_norm.default)
def _norm(
    func: Any, t: ShardedTensor, order: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    if order != 2 or keepdim:
        return NotImplemented
    dims = list(range(t.ndim)) if dim is None else [d % t.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    squares = func(t._own, 2, dims, False, **kwargs).square()
    return _reduced(t, squares, dims).sqrt()


@_rule(aten.any.default, aten.all.default)
def _judged(func: Any, t: ShardedTensor) -> Tensor:
    """Whether some, or no, process has an entry that counts."""
    counts = (t._own != 0).any() if func is aten.any.default else (t._own == 0).any()
    found = t._cut.total(counts.to(torch.float32)) > 0
    return found if func is aten.any.default else ~found
