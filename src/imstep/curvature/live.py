"""Autograd's graph of a loss as far as it leads to parameters; what else requires gradients is a constant there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes

from imstep.complexstep.graph import walk
from imstep.complexstep.islands import unseen


class Live:
    """A node of autograd's graph that leads to parameters. It has all that the node has, but for its edges.

    Args:
        node: of the graph.
        reach: of the parameters; None where all that requires gradients counts.
    """

    def __init__(self, node: Any, reach: Reach | None) -> None:
        self.node, self._reach = node, reach

    @cached_property
    def next_functions(self) -> tuple[tuple[Live | None, int], ...]:
        """As of the node, with None for what leads to no parameter."""
        edges, reach = self.node.next_functions, self._reach
        alone = reach is None or sum(below is not None for below, _ in edges) < 2  # where one alone leads on, it does
        kept = [below is not None and (alone or reach is None or reach.includes(below)) for below, _ in edges]
        return tuple((Live(edge[0], reach) if keep else None, edge[1]) for edge, keep in zip(edges, kept, strict=True))

    def is_linear(self) -> bool:
        """Whether what it passes back depends on no parameter; a Function's own backward pass is not asked."""
        if isinstance(self.node, BackwardCFunction):
            return False
        with torch.enable_grad(), unseen(), _disable_current_modes():
            ones = [torch.ones(of.shape, dtype=of.dtype, device=of.device) for of in self.node._input_metadata]
            given = [t.requires_grad_() if t.is_floating_point() or t.is_complex() else None for t in ones]
            try:
                passed = self.node(*given)
            except (RuntimeError, TypeError):
                return False
            roots = [t.grad_fn for t in (passed if isinstance(passed, tuple) else (passed,)) if t is not None]
        leaves = [below.variable for below in walk(roots) if hasattr(below, "variable")]
        return all(any(t is one for one in ones) or not self._counts(t) for t in leaves)

    def _counts(self, leaf: Tensor) -> bool:
        return self._reach is None or self._reach.owns(leaf)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Live) and self.node is other.node

    def __hash__(self) -> int:
        return hash(self.node)


class Reach:
    """The nodes that lead to some parameters, as far as was asked."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._own, self._known = {id(p) for p in parameters}, dict[Any, bool]()

    def owns(self, leaf: Tensor) -> bool:
        """Whether a leaf is one of them."""
        return id(leaf) in self._own

    def includes(self, node: Any) -> bool:
        """Whether a node leads to one of them."""
        known, way = self._known, [(node, iter(node.next_functions))]
        while way:
            at, rest = way[-1]
            if known.setdefault(at, id(getattr(at, "variable", None)) in self._own):
                known.update((passed, True) for passed, _ in way)
                return True
            below = next((n for n, _ in rest if n is not None and known.get(n, True)), None)
            if below is None:
                way.pop()
            else:
                way.append((below, iter(below.next_functions)))
        return False
