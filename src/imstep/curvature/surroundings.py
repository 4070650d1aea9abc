"""What a closure is evaluated in, whatever region calls the library: autocast, and what cannot be served."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from imstep.curvature.parameters import ParameterVector


class Surroundings:
    """The state that a closure's evaluations share with the call that they belong to.

    The library's own algebra runs without autocast; the closure runs under the autocast that was on when this was made.

    Raises:
        ValueError: inference mode is on, or the parameters are shards of several processes.
    """

    def __init__(self, parameters: ParameterVector) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "this is called under torch.inference_mode(), where PyTorch records no graph, so that there is no "
                "gradient. Call it outside; torch.no_grad() around it does no harm."
            )
        if any(_is_sharded(p) for p in parameters.tensors):
            raise ValueError(f"a parameter is sharded over processes (fully_shard, DTensor). {_ALONE}")
        kinds = {"cpu", parameters.device.type}
        self._autocast = [(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)]
        self._cached = torch.is_autocast_cache_enabled()
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context for the closure's own code."""
        with ExitStack() as stack:
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cached))
            if self._several:
                stack.callback(register_module_forward_pre_hook(_refuse_parallel).remove)
            yield


_ALONE = (
    "Gradients, products and losses of the processes are not added up, so their parameters would drift apart. Train in "
    "one process: with the plain model, on the whole batch or on one that fits; summing over processes is not "
    "supported yet."
)


def _is_sharded(p: Any) -> bool:
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def _refuse_parallel(module: Any, inputs: Any) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp is not None else []))
    if isinstance(module, kinds) and dist.get_world_size(module.process_group) > 1:
        raise ValueError(f"the closure evaluates a model wrapped in {type(module).__name__}. {_ALONE}")
