"""The cases that a loss is a sum over, and matrices of their gradients: Σ_i v_i v_iᵀ.

A loss Σ_i c_i ℓ_i of losses ℓ_i = -log p(y_i | z_i) has the Fisher matrix Σ_i c_i E[∇ℓ_i ∇ℓ_iᵀ]. Its convex ends tell
the distribution p and the weights c_i. With v_i = √c_i ∇ℓ_i = Jᵀs_i, where s_i is of the outputs z_i alone, a product
is one replay to the outputs, an inner product for each case, and one backward pass; no gradient of a case is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import plain
from imstep.complexstep.later import later_grad
from imstep.complexstep.loss_split import ConvexLoss
from imstep.curvature.families import Family, family, is_penalty
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.products import Products, ShiftedProducts
from imstep.curvature.sampling import end_weights


@dataclass(frozen=True, eq=False)
class Rows:
    """The part of v_i that passes through one end of the loss.

    Attributes:
        end: where.
        s: (k, *z.shape), k vectors for each case; None where ``diagonal`` stands for them.
        summed: dimensions of s that make up one case.
        diagonal: of the Hessian in z itself, of what the loss adds of a parameter alone.
    """

    end: ConvexLoss
    s: Tensor | None
    summed: list[int]
    diagonal: Tensor | None = None

    def block(self, change: Tensor) -> Tensor:
        """Σ_i s_i s_iᵀ times a change of z."""
        if self.s is None:
            assert self.diagonal is not None
            return self.diagonal * change
        inner = self.s * change
        return (self.s * (inner.sum(self.summed, keepdim=True) if self.summed else inner)).sum(0)


def drawn_rows(at: Linearisation, samples: int, generator: torch.Generator) -> list[Rows]:
    """For targets drawn from the model, each with its share 1/samples."""
    found = []
    for end, kind, c in _ends(at):
        scale = (c / samples).sqrt()
        s = torch.stack([scale * kind.drawn(end, generator) for _ in range(samples)])
        found.append(Rows(end, s, [d + 1 for d in kind.summed(end)]))
    return found + _penalties(at)


def observed_rows(at: Linearisation) -> list[Rows]:
    """For the targets that were observed; squared errors count as if the loss were the mean of the cases' losses.

    Raises:
        ValueError: the gradients of cases cannot be told apart.
    """
    assert at.split is not None
    _check_apart(at.split.losses)
    ends, found = _ends(at), []
    gradients = later_grad(at.loss, [end.z for end, *_ in ends]) if ends else ()
    for (end, kind, c), g in zip(ends, gradients, strict=True):
        g, dimensions = g.detach(), [d + 1 for d in kind.summed(end)]
        if kind.scaled:
            s = torch.where(c > 0, g / c.sqrt(), 0.0)
        else:
            counted = c.expand_as(g) > 0
            cases = counted.flatten(1).any(1).sum() if g.ndim > 1 else counted.sum()
            s = g * cases.to(g.dtype).sqrt()
        found.append(Rows(end, s[None], dimensions))
    return found + _penalties(at)


def case_matrix(
    point: Linearised, parameters: ParameterVector, rows: Callable[[Linearisation], list[Rows]]
) -> SymmetricOperator:
    """Σ_i v_i v_iᵀ at a point with its graph, from the rows of an evaluation.

    Cost: a product is 4/3 of a gradient; of a batch in pieces also an evaluation of each piece.
    """

    def build(at: Linearisation) -> SymmetricOperator:
        source: Products = _CaseProducts(at, parameters.evaluated, rows(at))
        source = source if at.penalty is None else ShiftedProducts(source, at.penalty.factors)
        return SymmetricOperator(parameters.evaluated, source, definite=True)

    return point.matrix(parameters, build, definite=True, graph=True)


class _CaseProducts(Products):
    """Products by one replay to the outputs and one backward pass."""

    def __init__(self, at: Linearisation, parameters: ParameterVector, rows: Sequence[Rows]) -> None:
        super().__init__(parameters, parameters)
        self._parameters, self._rows = parameters, rows
        self._outputs = [output for row in rows for output in row.end.sides]
        self._tape = at.tape.reaching([reference for reference, *_ in self._outputs])
        self.nbytes = self._tape.nbytes

    def check(self) -> None:
        self._tape.check()

    def one(self, direction: Tensor) -> Tensor:
        changes = iter(self._tape.replay(self._parameters.unflatten(direction)))
        pulled: list[Tensor] = []
        for row in self._rows:
            outputs = row.end.sides
            total = torch.zeros_like(plain(row.end.z).detach())
            for _, _, sign in outputs:
                change = next(changes)
                total = total if change is None else total + sign * change
            image = row.block(total)
            pulled += [(sign * image).expand(z.shape) for _, z, sign in outputs]
        gradients = later_grad([z for _, z, _ in self._outputs], self._parameters.tensors, pulled)
        return self._parameters.flatten(gradients)


def _ends(at: Linearisation) -> list[tuple[ConvexLoss, Family, Tensor]]:
    """The ends of data, with their distributions and weights."""
    assert at.split is not None
    ends = [end for end in at.split.losses if not is_penalty(end)]
    found = []
    for end, passed in zip(ends, end_weights(at.loss, ends) if ends else [], strict=True):
        kind = family(end)
        assert kind is not None
        found.append((end, kind, kind.weights(end, passed).to(end.z.dtype)))
    return found


def _penalties(at: Linearisation) -> list[Rows]:
    """What the loss adds of parameters alone: its Hessian."""
    assert at.split is not None
    ends = [end for end in at.split.losses if is_penalty(end)]
    weights = end_weights(at.loss, ends) if ends else []
    found = []
    for end, passed in zip(ends, weights, strict=True):
        kind = family(end)
        assert kind is not None
        found.append(Rows(end, None, [], kind.weights(end, passed)))
    return found


def _check_apart(ends: Sequence[ConvexLoss]) -> None:
    """Raise if an output is computed from another, or has two losses."""
    nodes = [_node(end.z) for end in ends]
    apart = len(set(nodes)) == len(nodes)
    if apart and len(nodes) > 1:
        data = {node for node, end in zip(nodes, ends, strict=True) if not is_penalty(end)}
        apart = not any(end.z.is_leaf and not is_penalty(end) for end in ends)
        apart = apart and all(data.isdisjoint(_behind(node[0])) for node in data)
    if not apart:
        raise ValueError(
            "the empirical Fisher matrix needs the gradient of each case's loss, and one output of the model is part "
            "of two losses or computed from another. Give each loss an output of its own, or use Exact() or "
            "MonteCarlo()."
        )


def _node(z: Tensor) -> tuple[Any, int]:
    return (z.grad_fn, z.output_nr) if z.grad_fn is not None else (z, 0)


def _behind(node: Any) -> set[tuple[Any, int]]:
    """What a node's arguments are computed from."""
    seen: set[tuple[Any, int]] = set()
    waiting = [node]
    while waiting:
        for edge in waiting.pop().next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                waiting.append(edge[0])
    return seen
