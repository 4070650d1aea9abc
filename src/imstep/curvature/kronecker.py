"""The Kronecker-factored approximation of the Gauss-Newton matrix, as a preconditioner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.later import later_grad
from imstep.curvature.dealt import inverse_of, sharing_of
from imstep.curvature.direct import diagonal_in
from imstep.curvature.kronecker_blocks import Block, FactoredDamping, LayerInverses, disjoint
from imstep.curvature.kronecker_inverse import DampedFactors
from imstep.curvature.kronecker_totals import Totals, found_together
from imstep.curvature.layers import LayerObserver, LayerUse
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.parameters import ParameterVector, as_reals
from imstep.curvature.pieces import Linearised
from imstep.curvature.sampling import Place, pulled, sample_output_gradients
from imstep.linalg import LinearOperator


class KroneckerFactors:
    """Running averages of the Kronecker factors of a model's layers; a diagonal for all other parameters.

        block of a layer = A ⊗ G,   A = E[a aᵀ],   G = E[g gᵀ] summed over the batch

    Args:
        parameters: the vector the preconditioner works on.
        decay: weight of the past in the running averages, in [0, 1); the first estimates are averaged evenly.
        inverses: how the damped matrices of layers are inverted.
        alone: whether the diagonal is found also where no layer is met; it takes a backward pass as well.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), sections 3 and 5; for convolutions Grosse and Martens,
        ICML 2016 (arXiv 1602.01407). The factors only precondition: products stay exact.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        decay: float = 0.8,
        inverses: LayerInverses | None = None,
        alone: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}.")
        self._parameters, self._decay, self._inverses = parameters, decay, inverses or FactoredDamping()
        self._alone = alone
        self._sharing = sharing_of(parameters)
        self._blocks: dict[int, Block] = {}
        self._diagonals: dict[int, Tensor] = {}
        self._direct: dict[int, float] = {}  # mean curvature of losses of a parameter itself, such as weight decay
        self._updates = 0

    def update(
        self,
        point: Linearised,
        observer: LayerObserver,
        generator: torch.Generator,
    ) -> bool:
        """Take the layers seen at a point into the averages: one backward pass with sampled targets.

        Returns:
            Whether there was any; else nothing has changed.
        """
        find = lambda generator, places=None, later=False: self._found(point, observer, generator, places, later)
        if self._parameters.processes is None:
            found = find(generator)
        else:
            found = found_together(self._parameters, point, generator, find, self._sharing)
        if not found.blocks and not found.squares:
            return False
        self._direct = found.direct
        keep = min(1 - 1 / (self._updates + 1), self._decay)
        self._updates += 1
        for number, block in found.finite().items():  # products of large numbers overflow before a gradient does
            block = replace(block, inputs=block.inputs / found.rows[number].clamp(min=1))
            self._blocks[number] = _average(self._blocks.get(number), block, keep)
        for number, square in found.squares.items():
            old = self._diagonals.get(number)
            self._diagonals[number] = square if old is None else keep * old + (1 - keep) * square
        if self._inverses.needs_cases:
            self._inverses.take(disjoint(self.blocks()), found.seen, keep, self._sharing)
        return True

    def _found(
        self,
        point: Linearised,
        observer: LayerObserver,
        generator: torch.Generator,
        places: Sequence[Place] | None,
        later: bool,
    ) -> Totals:
        """What the evaluations of this process tell."""
        found = Totals(later=later)
        for weight, at, own in point.evaluations(observer):
            if own.uses or self._alone:
                self._sample(weight, at, own.uses, generator, found, places)
            del at, own  # before the next evaluation takes their place
        return found

    def _sample(
        self,
        weight: float,
        point: Linearisation,
        uses: list[LayerUse],
        generator: torch.Generator,
        into: Totals,
        places: Sequence[Place] | None,
    ) -> None:
        """Add what one evaluation tells, counted ``weight`` times: targets sampled anew are independent of others.

        Where it is a part of a batch by ``places``, gradients take the place of squares.
        """
        assert point.split is not None
        ends, tensors = point.split.losses, self._parameters.evaluated.tensors
        sample = sample_output_gradients if places is None else partial(sample_output_gradients, places=places)
        outputs, u = pulled(ends, sample(point.loss, ends, generator))
        rest = self._not_layers(uses)
        for at, value in _direct_curvature(tensors, outputs, u).items():
            into.direct[at] = into.direct.get(at, 0.0) + weight * value
        inputs: list[Tensor | GradientEdge] = [*(use.edge for use in uses), *(tensors[at] for at in rest)]
        found = later_grad(outputs, inputs, u, keep=point.keeps_graph)
        gradients = [use.gradient(g) for use, g in zip(uses, found, strict=False)]
        # Layers may compute in half precision, whose products overflow or lose digits; averages are in the vector's.
        dtype = self._parameters.dtype
        for use, g in zip(uses, gradients, strict=True):
            if g is not None:
                into.take(weight, use, g, dtype)
        if self._inverses.needs_cases:
            into.seen.append((weight, list(zip(uses, gradients, strict=True))))
        for at, g in zip(rest, found[len(uses) :], strict=True):
            old = into.squares.get(at)
            if g is not None:
                gradient = as_reals(g.detach()).to(dtype)
                square = weight * gradient**2 if places is None else math.sqrt(weight) * gradient
                into.squares[at] = square if old is None else old + square
            elif old is None:
                into.squares[at] = torch.zeros_like(as_reals(tensors[at].detach()), dtype=dtype)

    def preconditioner(self, damping: float, decay: Sequence[float] | None = None) -> LinearOperator | None:
        """(approximation + damping I)⁻¹, None before the first update; ``decay`` is added for each parameter."""
        if not self._blocks and not self._diagonals:
            return None
        blocks = disjoint(list(self._blocks.values()))
        shifts = [damping + rate for rate in decay or [0.0] * len(self._parameters.tensors)]
        factors = DampedFactors(blocks, self._diagonals, self._direct, shifts, self._inverses)
        return inverse_of(self._sharing, self._parameters, factors)

    def blocks(self) -> list[Block]:
        """The factors of each layer."""
        return list(self._blocks.values())

    def diagonals(self) -> dict[int, Tensor]:
        """Mean squared gradients of the other parameters, by position."""
        return self._diagonals

    def direct(self, weight: int) -> float:
        """Mean curvature of what the loss adds of a weight alone, such as weight decay."""
        return self._direct.get(weight, 0.0)

    def _not_layers(self, uses: list[LayerUse]) -> list[int]:
        layered = {at for use in uses for at in (use.weight, use.bias)} | {
            at for block in self._blocks.values() for at in (block.weight, block.bias)
        }
        return [at for at in range(len(self._parameters.tensors)) if at not in layered]

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors and numbers."""
        blocks = [
            {"weight": b.weight, "bias": b.bias, "inputs": b.inputs, "outputs": b.outputs}
            for b in self._blocks.values()
        ]
        diagonals = [{"parameter": at, "values": d} for at, d in self._diagonals.items()]
        direct = [{"parameter": at, "value": value} for at, value in self._direct.items()]
        state = {"updates": self._updates, "blocks": blocks, "diagonals": diagonals, "direct": direct}
        return {**state, "moments": self._inverses.state_dict()} if self._inverses.needs_cases else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._updates = state["updates"]
        blocks = [Block(**b) for b in state["blocks"]]
        self._sharing.deal((b.weight, len(b.inputs), len(b.outputs)) for b in blocks)
        self._blocks = {b.weight: self._sharing.held(b) for b in blocks}
        self._diagonals = {d["parameter"]: self._sharing.part(d["parameter"], d["values"]) for d in state["diagonals"]}
        self._direct = {d["parameter"]: d["value"] for d in state["direct"]}
        self._inverses.load_state_dict(state.get("moments", []), self._sharing)


def _direct_curvature(tensors: list[Tensor], outputs: Sequence[Tensor], u: Sequence[Tensor]) -> dict[int, float]:
    """The mean curvature of losses whose output is made of parameters alone; u² is the exact diagonal there."""
    position = {id(p): at for at, p in enumerate(tensors)}
    found: dict[int, float] = {}
    for z, signs in zip(outputs, u, strict=True):
        for at, diagonal in diagonal_in(z, signs.double().square(), position):
            found[at] = found.get(at, 0.0) + float(diagonal.sum()) / max(diagonal.numel(), 1)
    return found


def _average(old: Block | None, new: Block, keep: float) -> Block:
    if old is None or old.inputs.shape != new.inputs.shape:
        return new
    mix = lambda a, b: keep * a + (1 - keep) * b
    return Block(new.weight, new.bias, mix(old.inputs, new.inputs), mix(old.outputs, new.outputs))
