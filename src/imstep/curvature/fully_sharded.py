"""Models under ``torch.distributed.fsdp.fully_shard``: who holds what, and how they are evaluated on whole weights.

Within a step modules hold whole parameters that are gathered here, and the hooks by which ``fully_shard`` gathers and
reduces are left out: sums over processes are formed where products are. What of PyTorch is relied on is private; it
is all in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imstep.complexstep.tensor import hollow
from imstep.curvature.processes import Processes

INSTEAD = (
    "Train in one process; or keep the whole model in each, without sharding, and pass process_group= to NewtonKrylov "
    "or LeastSquares, which add up over processes."
)

FROM_OUTSIDE = (
    "the closure computes with a sharded parameter (a DTensor) that it holds from outside. Modules hold whole "
    "parameters while it is evaluated: take them from the model inside the closure, by model.parameters() or "
    "model.layer.weight."
)


@dataclass(frozen=True, eq=False)
class Managed:
    """A parameter that ``fully_shard`` looks after.

    Attributes:
        holder: PyTorch's record of it.
        shape: of the whole.
        dim: along which it is sharded.
    """

    holder: Any
    shape: torch.Size
    dim: int


def is_sharded(p: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what defines it."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def local_part(p: Any) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    if not is_sharded(p):
        return p
    with torch.no_grad():
        return p.to_local()


def local_part_as(t: Any, like: Any) -> Tensor:
    """What this process holds of a tensor, if that is sharded as another one."""
    if not is_sharded(like):
        return t.full_tensor() if is_sharded(t) else t
    if not is_sharded(t):
        raise ValueError(
            "a list to multiply holds shards (DTensors) and a whole tensor in place of another one. Pass shards for "
            "all parameters that are sharded, such as their .grad, or whole tensors for all."
        )
    with torch.no_grad():
        return t.redistribute(like.device_mesh, like.placements).to_local()


def as_shard(part: Tensor, like: Any) -> Tensor:
    """A process's part as a tensor that is sharded as another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def managed(tensors: Sequence[Tensor], processes: Processes) -> list[Managed | None]:
    """For each parameter who looks after it; None for one that is not sharded.

    Raises:
        ValueError: one is sharded, but not by ``fully_shard`` over these processes in full precision.
    """
    holders = {id(holder.sharded_param): holder for state in _states() for holder in _holders(state)}
    return [_managed(p, holders.get(id(p)), processes) if is_sharded(p) else None for p in tensors]


def _managed(p: Any, holder: Any, processes: Processes) -> Managed:
    mesh = p.device_mesh
    if holder is None or holder.is_dtensor:
        raise ValueError(
            "a parameter is distributed (a DTensor), but not by torch.distributed.fsdp.fully_shard alone: steps under "
            f"tensor parallelism are not supported. Shard the model by fully_shard(model) only. {INSTEAD}"
        )
    if mesh.ndim != 1 or not p.placements[0].is_shard():
        raise ValueError(
            f"a parameter is sharded over a mesh of shape {tuple(mesh.mesh.shape)}, in part as copies (hybrid "
            "sharding), which is not supported. Call fully_shard(model, mesh=init_device_mesh(type, (number,))) with "
            f"one dimension. {INSTEAD}"
        )
    if not processes.are(mesh.mesh.flatten().tolist()):
        raise ValueError(
            f"the model is sharded over the processes {mesh.mesh.flatten().tolist()}, and process_group is of others. "
            "Pass process_group=mesh.get_group(), of the mesh that fully_shard was given; without one it takes "
            "torch.distributed.group.WORLD."
        )
    policy, kinds = holder.mp_policy, (None, p.dtype)
    if policy.param_dtype not in kinds or policy.output_dtype not in kinds:
        raise ValueError(
            f"fully_shard was given {policy}: a model in lower precision, by hooks that are left out in a step. "
            "Leave mp_policy out, and evaluate the model in the closure under torch.autocast."
        )
    if holder.offload_to_cpu:
        raise ValueError(
            "fully_shard was given a CPUOffloadPolicy, by which parameters are on another device than the model "
            "computes on; this is not supported. Leave offload_policy out."
        )
    return Managed(holder, p.shape, p.placements[0].dim)


def refuse_sharded(tensors: Iterable[Tensor]) -> None:
    """Raise if a parameter is sharded, or is what ``fully_shard`` has gathered for the time of an evaluation."""
    tensors = list(tensors)
    if any(is_sharded(p) for p in tensors):
        raise ValueError(
            "a parameter is sharded over processes (fully_shard, DTensor). Of shards there are steps by "
            "NewtonKrylov(model.parameters(), process_group=torch.distributed.group.WORLD), and operators by "
            "Hessian.over([batch], loss, model, process_group=...) and likewise; for all else load the weights into a "
            "model that is not sharded, with get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)) of torch.distributed.checkpoint.state_dict. "
            f"{INSTEAD}"
        )
    gathered = {id(getattr(holder, "_unsharded_param", None)) for state in _states() for holder in _holders(state)}
    if any(id(p) in gathered for p in tensors):
        raise ValueError(
            "a parameter is a copy that fully_shard has gathered for an evaluation: what is written to it is lost. "
            "Build the optimizer before the model is evaluated, or call model.reshard() first, and pass "
            "model.parameters() and process_group=."
        )


def refuse_foreign(module: Any) -> None:
    """Raise where a module is about to gather its parameters itself."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return
    if isinstance(module, loaded.FullyShardedDataParallel):
        if torch.distributed.get_world_size(module.process_group) > 1:
            raise ValueError(
                f"the closure evaluates a model in {type(module).__name__}, which is sharded in a way that is not "
                f"supported. Use torch.distributed.fsdp.fully_shard(model) in its place. {INSTEAD}"
            )
    elif isinstance(module, loaded.FSDPModule) and not getattr(module._get_fsdp_state(), _MARK, False):
        raise ValueError(
            "the closure evaluates a model under fully_shard of which no parameter belongs to the optimizer. Evaluate "
            f"it outside the closure, if its outputs are data; else pass its parameters, too. {INSTEAD}"
        )


@dataclass(frozen=True, eq=False)
class Together:
    """What one call of ``fully_shard`` gathers.

    Attributes:
        holders: of its parameters.
        frozen: of those that are not trained, with hollow tensors that stand for the whole ones.
        kept: whether they are to stay whole between forward and backward passes.
    """

    holders: list[Any]
    frozen: list[tuple[Any, Tensor]]
    kept: bool

    @property
    def size(self) -> int:
        """How many entries they have."""
        return sum(holder.sharded_param.numel() for holder in self.holders)

    @property
    def fixed(self) -> list[tuple[Tensor, Callable[[], Tensor]]]:
        """What stands for frozen parameters, and what gathers each."""
        return [(p, partial(_gathered, holder)) for holder, p in self.frozen]


def _gathered_together(state: Any, group: Any, ours: set[int]) -> Together:
    frozen: list[tuple[Any, Tensor]] = []
    for holder in group.fsdp_params:
        if id(holder) not in ours:
            p = holder.sharded_param
            frozen.append((holder, nn.Parameter(hollow(p.shape, p.dtype, p.device), requires_grad=False)))
    kept = group.post_forward_mesh_info is None and not state._auto_reshard_after_forward
    return Together(list(group.fsdp_params), frozen, kept)


def together(groups: Sequence[Together], most: int) -> list[list[Together]]:
    """Groups that follow each other, as many as have up to ``most`` entries; those that are kept apart from others."""
    found: list[list[Together]] = []
    for group in groups:
        last = found[-1] if found else []
        if last and last[0].kept == group.kept and sum(g.size for g in (*last, group)) <= most:
            last.append(group)
        else:
            found.append([group])
    return found


def _gathered(holder: Any) -> Tensor:
    with torch.no_grad():
        whole: Tensor = holder.sharded_param.full_tensor()
    return whole


class Models:
    """The models that parameters belong to.

    Args:
        owned: the parameters.

    Attributes:
        groups: their parameters, as they are gathered.
    """

    def __init__(self, owned: Sequence[Managed]) -> None:
        ours = {id(own.holder) for own in owned}
        states = _states()
        modules = {id(m) for state in states if ours & set(map(id, _holders(state))) for m in state._modules}
        # All of a model is evaluated: what holds a module of ours, and all that is in it.
        tops = [m for state in states for m in state._modules if not modules.isdisjoint(map(id, m.modules()))]
        inside = {id(m) for top in tops for m in top.modules()}
        self._states = [state for state in states if not inside.isdisjoint(map(id, state._modules))]
        self.groups = [
            _gathered_together(state, group, ours) for state in self._states for group in _groups(state)
        ]

    def reshard(self) -> None:
        """Drop what was gathered of the parameters as they were before."""
        for state in self._states:
            for group in _groups(state):
                group.reshard()

    @contextmanager
    def shown(self, whole: Sequence[tuple[Managed, Tensor]]) -> Iterator[None]:
        """A context in which modules hold whole parameters, and gather nothing; all processes enter it together."""
        self.reshard()
        with ExitStack() as stack:
            for holder, p in [*((own.holder, p) for own, p in whole), *(f for g in self.groups for f in g.frozen)]:
                stack.callback(holder._setattr_on_modules, holder.sharded_param)
                holder._setattr_on_modules(p)
            for state in self._states:
                _silence(state, stack)
            yield


_MARK = "_imstep_shown"


def _silence(state: Any, stack: ExitStack) -> None:
    """Leave out the hooks of a state until the stack ends."""
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for one in getattr(handle, "handles", [handle]):
            hooks = one.hooks_dict_ref()
            stack.callback(hooks.__setitem__, one.id, hooks[one.id])
            hooks[one.id] = lambda *args, **kwargs: None
    # Methods that were registered to gather as forward does look these up.
    for name, plain in (("_pre_forward", lambda module, args, kwargs: (args, kwargs)), ("_post_forward", _output)):
        stack.callback(delattr, state, name)
        setattr(state, name, plain)
    stack.callback(delattr, state, _MARK)
    setattr(state, _MARK, True)


def _output(module: Any, inputs: Any, output: Any) -> Any:
    return output


def _states() -> list[Any]:
    """Of all that ``fully_shard`` was called on and that is alive."""
    loaded = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if loaded is None:
        return []
    every = [state() for state in sys.modules["torch.distributed._composable_state"]._module_state_mapping.values()]
    return list({id(state): state for state in every if isinstance(state, loaded.FSDPState)}.values())


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # the only one before PyTorch 2.12


def _holders(state: Any) -> list[Any]:
    return [holder for group in _groups(state) for holder in group.fsdp_params]
