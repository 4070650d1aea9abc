"""Products whose operators a GPU is given once, and starts together for each direction: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imstep.curvature.products import Products

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], object], Tensor]]
"""Runs a function on a device; returns what runs it again on the same memory, and where its result then lies."""

_WARM = 3  # runs before a capture, in which libraries choose their kernels and take their memory


def cuda_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """A :data:`Capture` by :class:`torch.cuda.CUDAGraph`."""
    if device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need a CUDA device, and the operator's vectors are on {device}. Use the operator as it is: "
            "its products are replayed there, too, one operator after the other."
        )
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run()
    return graph.replay, made


class _Last(TorchDispatchMode):
    """A context that remembers the last operator which was called."""

    operator: Any = "nothing"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operator = func
        return func(*args, **(kwargs or {}))


class StaticProducts(Products):
    """Products that were captured: what differs from one to the next is what lies in two vectors.

    Args:
        products: that run the same operators on the same memory each time.
        capture: how.

    Raises:
        ValueError: products that do not, or a device that has no such captures.
        RuntimeError: an operator that cannot be captured, as one that waits for a value.
    """

    def __init__(self, products: Products, capture: Capture) -> None:
        super().__init__(products.rows, products.columns)
        if not products.fixed:
            raise ValueError(
                "products of this operator are not replays of one record: they evaluate the closure anew, or belong to "
                "several batches or processes. Build it with one closure and without memory_budget, or use it as it is."
            )
        self._products, self.nbytes = products, products.nbytes
        self._given = torch.zeros(self.columns.size, dtype=self.columns.dtype, device=self.columns.device)
        last = _Last()
        try:
            with torch.no_grad(), last:
                self._again, self._made = capture(lambda: products.one(self._given), self.columns.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"a product could not be captured: {last.operator} waits for a value, or draws memory in a way that "
                f"captures do not allow ({error}). Use the operator as it is."
            ) from error

    def one(self, direction: Tensor) -> Tensor:
        self._given.copy_(direction)
        self._again()
        return self._made.clone()

    def several(self, directions: Tensor) -> Tensor:
        return self._products.several(directions)

    def check(self) -> None:
        self._products.check()
