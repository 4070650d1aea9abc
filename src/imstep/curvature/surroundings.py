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

from imstep.curvature.exchanges import differentiable
from imstep.curvature.fully_sharded import refuse_foreign, refuse_sharded
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes


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
        refuse_sharded(parameters.tensors)
        kinds = {"cpu", parameters.device.type}
        self._autocast = [(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)]
        self._cached = torch.is_autocast_cache_enabled()
        self._processes, self._looked_at = parameters.processes, parameters.looked_at
        self._parallel = dist.is_available() and dist.is_initialized()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context for the closure's own code."""
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code runs uncompiled, in all evaluations alike
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cached))
            if self._parallel:
                foreign = register_module_forward_pre_hook(lambda module, inputs: refuse_foreign(module))
                stack.callback(foreign.remove)
                stack.callback(setattr, DistributedDataParallel, "forward", DistributedDataParallel.forward)
                plain = lambda *args, **kwargs: _unwrapped(self._processes, *args, **kwargs)
                setattr(DistributedDataParallel, "forward", plain)  # noqa: B010 (a method is not assigned to)
                stack.enter_context(differentiable(self._processes))
            stack.enter_context(self._looked_at())
            yield


def _unwrapped(processes: Processes | None, module: Any, *inputs: Any, **kwargs: Any) -> Any:
    """What a data-parallel model computes, without its own exchanges: the sums are formed where products are, too."""
    if dist.get_world_size(module.process_group) > 1:
        if processes is None or not processes.same_as(module.process_group):
            raise ValueError(
                f"the closure evaluates a model wrapped in {type(module).__name__}. Gradients, products and losses of "
                "its processes are not added up here, so their parameters would drift apart. Pass "
                "process_group=torch.distributed.group.WORLD, or the group that the model was given, to the optimizer "
                "or to an operator's over(). Train in one process, with the plain model, by what takes none."
            )
        if module._join_config.enable:
            raise ValueError(
                "the closure evaluates a model under torch's Join, which waits for exchanges that a step makes "
                "otherwise. Leave Join out: a process without data takes steps on MicroBatches(loss, [])."
            )
    # A forward pass in training mode without its backward pass has left it waiting for gradients.
    module.reducer._reset_state()
    if module.device_ids:
        device = torch.device(module.device_type, module.device_ids[0])
        (inputs,), (kwargs,) = module.to_kwargs(inputs, kwargs, device.index)
    return module.module(*inputs, **kwargs)
