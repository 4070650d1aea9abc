"""What a closure may exchange with those of other processes, written with collectives that have derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn import functional as F

from imstep.complexstep.rules.collectives import exchanging
from imstep.curvature.processes import Processes

_UNEQUAL = (
    "Its processes do not count the same, or evaluate pieces, where derivatives would be weighted wrongly. Let every "
    "process pass a plain closure, or one batch with as many examples as the others' (a DistributedSampler makes them "
    "so)."
)
_OTHERS = "The collective is of processes that are not in its process_group."


@contextmanager
def differentiable(processes: Processes | None) -> Iterator[None]:
    """A context for a closure: collectives of ``torch.distributed.nn`` and SyncBatchNorm have derivatives of any order.

    Args:
        processes: that evaluate closures together; None for one alone.
    """
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.nn import functional as differentiated

    with ExitStack() as stack:
        if processes is not None:
            stack.enter_context(exchanging(lambda ranks: _reason(processes, ranks)))

        def put(place: Any, name: str, value: Any) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        put(functional, "_maybe_wrap_tensor", functional.wait_tensor)  # no wrapper, which waits when it is looked at
        for name, function in _DIFFERENTIATED.items():
            put(differentiated, name, function)
        put(SyncBatchNorm, "forward", _sync_batch_norm)
        yield


def _reason(processes: Processes, ranks: Sequence[int]) -> str | None:
    if not processes.includes(ranks):
        return _OTHERS
    return None if processes.alike else _UNEQUAL


def _sum(x: Tensor, group: Any) -> Tensor:
    name = (group or dist.distributed_c10d._get_default_group()).group_name
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", name))


class _Function:
    """In place of an ``autograd.Function`` of ``torch.distributed.nn``, with the same arguments."""

    def __init__(self, apply: Any) -> None:
        self.apply = apply


def _all_reduce(op: Any, group: Any, x: Tensor) -> Tensor:
    if op == dist.ReduceOp.SUM:
        return _sum(x, group)
    if op == dist.ReduceOp.AVG:
        return _sum(x, group) / dist.get_world_size(group)
    raise ValueError(
        f"a closure reduces over processes by {op}, which is not differentiated. Take ReduceOp.SUM or AVG; for a "
        "largest or least value gather all by torch.distributed.nn.functional.all_gather, and take it of these."
    )


def _all_gather(group: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Each in its place of zeros, added up: gloo has no scatter of sums, which gathering derives to."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    placed = F.pad(x.unsqueeze(0), [0, 0] * x.dim() + [rank, size - 1 - rank])
    return _sum(placed, group).unbind(0)


def _reduce_scatter(op: Any, group: Any, into: Tensor, *xs: Tensor) -> Tensor:
    found = _all_reduce(op, group, torch.stack(xs))[dist.get_rank(group)]
    into.detach().copy_(found.detach())
    return found


def _broadcast(source: int, group: Any, x: Tensor) -> Tensor:
    # Zeros with a graph in the others, so that all come to the exchange of its derivative.
    given = torch.full_like(x, dist.get_rank() == source, dtype=torch.bool)
    return _sum(x.where(given, 0.0), group)


def _refused(name: str) -> Any:
    def apply(*args: Any) -> Any:
        raise ValueError(
            f"a closure calls torch.distributed.nn.functional.{name}, which is not differentiated twice. Take "
            "all_reduce, all_gather, reduce_scatter or broadcast in its place."
        )

    return apply


_DIFFERENTIATED = {
    "_AllReduce": _Function(_all_reduce),
    "_AllGather": _Function(_all_gather),
    "_Reduce_Scatter": _Function(_reduce_scatter),
    "_Broadcast": _Function(_broadcast),
    "_Reduce": _Function(_refused("reduce")),
    "_Gather": _Function(_refused("gather")),
    "_Scatter": _Function(_refused("scatter")),
    "_AllGatherBase": _Function(_refused("_all_gather_base")),
    "_AlltoAll": _Function(_refused("all_to_all")),
    "_AlltoAllSingle": _Function(_refused("all_to_all_single")),
}


# --- batch normalisation --------------------------------------------------------------------------------------------


def _sync_batch_norm(self: SyncBatchNorm, x: Tensor) -> Tensor:
    """Normalise by the examples of all processes, on any device; PyTorch's kernels have no second derivative.

        y = (x - m) / sqrt(v + ε) w + b,   m = Σ x / N,  v = Σ (x - m)² / N   over processes, examples and places
    """
    self._check_input_dim(x)
    self._check_non_zero_input_channels(x)
    tracked = self.running_mean is not None and self.running_var is not None
    group = self.process_group or dist.group.WORLD
    if not (self.training or not tracked) or dist.get_world_size(group) == 1:
        return torch.nn.modules.batchnorm._BatchNorm.forward(self, x)
    dims, shape, given = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)], x.dtype
    x = x.float() if given.itemsize < 4 else x
    own = x.new_full((1,), x.numel() / x.shape[1])
    total = _sum(torch.cat([x.sum(dims), own]), group)
    count = total[-1].detach()
    mean = total[:-1] / count
    centred = x - mean.view(shape)
    variance = _sum(centred.square().sum(dims), group) / count
    if self.training and tracked:
        _follow(self, mean.detach(), variance.detach() * (count / (count - 1)))
    y = centred * (variance + self.eps).rsqrt().view(shape)
    return (y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)).to(given)


@torch.no_grad()
def _follow(layer: Any, mean: Tensor, variance: Tensor) -> None:
    """Let running statistics follow those of a batch."""
    layer.num_batches_tracked.add_(1)
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), share)
