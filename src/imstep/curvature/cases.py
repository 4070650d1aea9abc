"""The cases that a loss is a sum over, and matrices of their gradients: Σ_i v_i v_iᵀ.

A loss Σ_i c_i ℓ_i of losses ℓ_i = -log p(y_i | z_i) has the Fisher matrix Σ_i c_i E[∇ℓ_i ∇ℓ_iᵀ]. Its convex ends tell
the distribution p and the weights c_i. With v_i = √c_i ∇ℓ_i = Jᵀs_i, where s_i is of the outputs z_i alone, a product
is one replay to the outputs, an inner product for each case, and one backward pass; no gradient of a case is formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gauss_newton import ConvexLoss
from imstep.complexstep.islands import plain
from imstep.complexstep.later import later_grad
from imstep.complexstep.steps import Reference
from imstep.curvature.frozen import Linearisation
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.products import Products, ShiftedProducts
from imstep.curvature.sampling import end_weights
from imstep.curvature.shared import SharedLinearisation

aten = torch.ops.aten
_MEAN = 1  # how PyTorch numbers the reductions of its losses


class Family(ABC):
    """The distribution that a convex end of a loss is -log p of, up to its weight.

    Attributes:
        scaled: whether the loss tells its scale; of squared errors it does not, which is their variance.
        natural: whether z are natural parameters, so that the Hessian in z does not depend on the targets.
    """

    scaled = natural = True

    @abstractmethod
    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        """c, by which ℓ counts in the loss, as the shape of z takes it; ``passed``: the weights of the end's result."""

    @abstractmethod
    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        """∂ℓ/∂z for targets drawn from the model, in the shape of z."""

    def summed(self, end: ConvexLoss) -> list[int]:
        """The dimensions of z that make up one case."""
        return list(range(1, end.z.ndim))


class _Gaussian(Family):
    """ℓ = (z - y)²/2."""

    scaled = False

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return 2 * passed * (_share(end, 2) if end.func is aten.mse_loss.default else 1.0)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        return torch.empty_like(_z(end)).normal_(generator=generator)


class _Categorical(Family):
    """ℓ = log Σ exp z - z_y."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return (-passed).sum(end.args[1], keepdim=True).clamp(min=0)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        z, dim = _z(end), end.args[1]
        p = z.softmax(dim, dtype=torch.promote_types(z.dtype, torch.float32))
        rows = p.movedim(dim, -1)
        labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator).view(*rows.shape[:-1], 1)
        chosen = torch.zeros_like(rows).scatter_(-1, labels, 1.0).movedim(-1, dim)
        return (p - chosen).to(z.dtype)

    def summed(self, end: ConvexLoss) -> list[int]:
        return [end.args[1] % max(end.z.ndim, 1)] if end.z.ndim else []


class _Bernoulli(Family):
    """ℓ = log(1 + exp z) - y z."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        _, y, weight, positive, *_ = [*end.args, None, None][:4]
        c = passed * _share(end, 4)
        c = c if weight is None else c * weight
        return c if positive is None else c * (1 + (positive - 1) * y)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        p = _z(end).sigmoid()
        return p - torch.bernoulli(p, generator=generator)


class _Softplus(Family):
    """The same as log(1 + exp βz)/β."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return passed / self._beta(end)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        beta = self._beta(end)
        p = (beta * _z(end)).sigmoid()
        return beta * (p - torch.bernoulli(p, generator=generator))

    def _beta(self, end: ConvexLoss) -> Any:
        return end.args[1] if len(end.args) > 1 else 1


class _Probability(Family):
    """ℓ = -y log z - (1 - y) log(1 - z): not of natural parameters."""

    natural = False

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        weight = end.args[2] if len(end.args) > 2 else None
        c = passed * _share(end, 3)
        return c if weight is None else c * weight

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        z = _z(end)
        y = torch.bernoulli(z, generator=generator)
        return torch.where(y > 0, -1 / z, 1 / (1 - z))


class _Poisson(Family):
    """ℓ = exp z - y z."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return passed

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        rate = _z(end).exp()
        return rate - torch.poisson(rate, generator=generator)


FAMILIES: dict[Any, Family] = {
    aten.mse_loss: _Gaussian(),
    aten.pow: _Gaussian(),
    aten.mul: _Gaussian(),
    aten._log_softmax: _Categorical(),
    aten.binary_cross_entropy_with_logits: _Bernoulli(),
    aten.binary_cross_entropy: _Probability(),
    aten.softplus: _Softplus(),
    aten.exp: _Poisson(),
}
"""By the operator that computes ℓ; the others, such as Huber's loss, are of no distribution in natural use."""


def family(end: ConvexLoss) -> Family | None:
    """The distribution of an end; None where it is none."""
    return FAMILIES.get(end.func.overloadpacket)


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
    point: Linearised, parameters: ParameterVector, rows: Callable[[], Callable[[Linearisation], list[Rows]]]
) -> SymmetricOperator:
    """Σ_i v_i v_iᵀ at a point, with its graph; what the loss adds of the parameters alone stays exact.

    Args:
        rows: begins to go through the evaluations that the loss is a sum of; then, for each, its rows.

    Cost: a product is 4/3 of a gradient; of a batch in pieces also an evaluation of each piece.
    """
    if isinstance(point, SharedLinearisation):
        return point.summed(parameters, lambda own: case_matrix(own, parameters, rows), definite=True)
    source: Products = _CaseProducts(point, parameters, rows)
    if point.penalty is not None:
        source = ShiftedProducts(source, point.penalty.factors)
    return SymmetricOperator(parameters, source, definite=True)


class _CaseProducts(Products):
    def __init__(
        self,
        point: Linearised,
        parameters: ParameterVector,
        rows: Callable[[], Callable[[Linearisation], list[Rows]]],
    ) -> None:
        super().__init__(parameters, parameters)
        self._point, self._parameters, self._rows = point, parameters, rows
        self._kept = _Evaluated(point, parameters, rows()(point)) if isinstance(point, Linearisation) else None

    def one(self, direction: Tensor) -> Tensor:
        if self._kept is not None:
            return self._kept.product(direction)
        total, rows = torch.zeros_like(direction), self._rows()
        for weight, at, _ in self._point.evaluations(None):
            total += weight * _Evaluated(at, self._parameters, rows(at)).product(direction)
        return total

    def check(self) -> None:
        if self._kept is not None:
            self._kept.tape.check()


class _Evaluated:
    """One evaluation with its graph."""

    def __init__(self, at: Linearisation, parameters: ParameterVector, rows: Sequence[Rows]) -> None:
        self._parameters, self._rows = parameters, rows
        self._outputs = [output for row in rows for output in _outputs(row.end)]
        self.tape = at.tape.reaching([reference for reference, *_ in self._outputs])

    def product(self, direction: Tensor) -> Tensor:
        changes = iter(self.tape.replay(self._parameters.unflatten(direction)))
        pulled: list[Tensor] = []
        for row in self._rows:
            outputs = _outputs(row.end)
            total = torch.zeros_like(_z(row.end))
            for _, _, sign in outputs:
                change = next(changes)
                total = total if change is None else total + sign * change
            image = row.block(total)
            pulled += [(sign * image).expand(z.shape) for _, z, sign in outputs]
        gradients = later_grad([z for _, z, _ in self._outputs], self._parameters.tensors, pulled)
        return self._parameters.flatten(gradients)


def _outputs(end: ConvexLoss) -> list[tuple[Reference, Tensor, int]]:
    """What ℓ takes of the parameters, with its signs: both sides of a squared error may depend on them."""
    if end.func is not aten.mse_loss.default:
        return [(end.references[0], end.z, 1)]
    signs = [1, -1]
    return [(ref, end.args[at], signs[at]) for ref, at in zip(end.references, end.positions, strict=True)]


def _ends(at: Linearisation) -> list[tuple[ConvexLoss, Family, Tensor]]:
    """The ends of data, with their distributions and weights."""
    assert at.split is not None
    ends = [end for end in at.split.losses if not is_penalty(end)]
    found = []
    for end, passed in zip(ends, end_weights(at.loss, ends) if ends else [], strict=True):
        kind = family(end)
        assert kind is not None
        found.append((end, kind, kind.weights(end, passed).to(_z(end).dtype)))
    return found


def _penalties(at: Linearisation) -> list[Rows]:
    """What the loss adds of parameters alone: its Hessian."""
    assert at.split is not None
    ends = [end for end in at.split.losses if is_penalty(end)]
    weights = end_weights(at.loss, ends) if ends else []
    gaussian = FAMILIES[aten.pow]
    return [Rows(end, None, [], gaussian.weights(end, w)) for end, w in zip(ends, weights, strict=True)]


def is_penalty(end: ConvexLoss) -> bool:
    """Whether an end is the square of a parameter itself, as in weight decay."""
    return end.z.is_leaf and isinstance(family(end), _Gaussian)


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


def _z(end: ConvexLoss) -> Tensor:
    return plain(end.z).detach()


def _share(end: ConvexLoss, reduction: int) -> float:
    """1/n where the operator takes the mean of n losses; its reduction is the argument of this number."""
    kind = end.args[reduction] if len(end.args) > reduction else _MEAN
    return 1 / max(end.z.numel(), 1) if kind == _MEAN else 1.0
