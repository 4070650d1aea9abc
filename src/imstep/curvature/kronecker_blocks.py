"""Matrices of single layers as Kronecker products, and how their damped inverses are made."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.layers import LayerUse

_CHUNK = 2**24
"""Entries of the gradients of single cases that are formed at once."""

_LEAST = 1e-7
"""Least curvature that a direction counts with, relative to the mean: below is rounding of float32 factors."""

Inverse = Callable[[Tensor], Tensor]
"""From a matrix (out, in) to the solution, of the same shape."""

Seen = tuple[float, list[tuple[LayerUse, Tensor | None]]]
"""How much an evaluation counts, and the uses of layers in it, each with the gradient of sampled targets there."""


@dataclass(frozen=True, eq=False)
class Block:
    """The factors of one weight (and its bias): the matrix G ⊗ A.

    Attributes:
        weight, bias: positions among the parameters.
        inputs: A = E[a aᵀ] over the rows a that the weight multiplies, (in, in).
        outputs: G = Σ g gᵀ over the gradients g of sampled targets at its outputs, (out, out).
    """

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class EigenBlock:
    """A weight's matrix in the eigenvectors of its Kronecker factors: W -> G (s * (GᵀW A)) Aᵀ.

    Attributes:
        weight, bias: positions among the parameters; the bias is a last column of W.
        inputs: A, (in, in), orthogonal.
        outputs: G, (out, out), orthogonal.
        values: s, (out, in).
    """

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor
    values: Tensor

    def applied(self, matrices: Tensor, factors: Tensor) -> Tensor:
        """Matrices (k, out, in), or one, multiplied by ``factors`` (out, in) in the eigenvectors."""
        inside = self.outputs.mT @ matrices @ self.inputs
        return self.outputs @ (inside * factors) @ self.inputs.mT

    def inverse(self, damping: float) -> Inverse:
        """Of the matrix and ``damping`` times the identity."""
        shift = max(damping, _LEAST * float(self.values.mean()))
        factors = 1 / (self.values + (shift if shift > 0 else 1.0))
        return partial(self.applied, factors=factors)

    def turned(self, into: EigenBlock) -> Tensor:
        """The diagonal of this matrix in other eigenvectors, (out, in)."""
        across, along = into.outputs.mT @ self.outputs, into.inputs.mT @ self.inputs
        return across.square() @ self.values @ along.square().mT


def decomposed(block: Block) -> EigenBlock:
    """G ⊗ A in its eigenvectors."""
    (a, inputs), (g, outputs) = (torch.linalg.eigh(m.double()) for m in (block.inputs, block.outputs))
    values = g.clamp(min=0)[:, None] * a.clamp(min=0)
    # Contiguous, as they come back from a file: products of other layouts round otherwise.
    parts = (t.to(block.inputs.dtype).contiguous() for t in (inputs, outputs, values))
    return EigenBlock(block.weight, block.bias, *parts)


def disjoint(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, a bias that several layers share being part of the first only."""
    taken: set[int] = set()
    disjoint = []
    for b in blocks:
        if b.bias in taken:
            b = Block(b.weight, None, b.inputs[:-1, :-1], b.outputs)
        if b.bias is not None:
            taken.add(b.bias)
        disjoint.append(b)
    return disjoint


def squared_cases(block: EigenBlock, uses: Sequence[tuple[LayerUse, Tensor | None]]) -> Tensor:
    """Squared gradients of the weight, each of one case, summed over cases, in a block's eigenvectors; (out, in)."""
    inputs, outputs, dtype = [], [], block.values.dtype
    for use, g in uses:
        if g is None:
            continue
        g = g.detach().movedim(use.channels, -1)
        cases = len(g) if g.ndim > 1 else 1
        # A bias that belongs to another layer's block is a last column that this one has not.
        rows = use.inputs[:, : len(block.inputs)].to(dtype)
        inputs.append((rows @ block.inputs).view(cases, -1, len(block.inputs)))
        outputs.append((g.reshape(-1, g.shape[-1]).to(dtype) @ block.outputs).view(cases, -1, len(block.outputs)))
    total = torch.zeros_like(block.values)
    if not inputs:
        return total
    if len({len(rows) for rows in inputs}) > 1:  # uses of different batches: no case has a part in two
        pairs = list(zip(inputs, outputs, strict=True))
    else:
        pairs = [(torch.cat(inputs, 1), torch.cat(outputs, 1))]
    for a, g in pairs:
        if a.shape[1] == 1:
            total += (g[:, 0] ** 2).mT @ a[:, 0] ** 2
            continue
        chunk = max(1, _CHUNK // total.numel())
        for some_a, some_g in zip(a.split(chunk), g.split(chunk), strict=True):
            total += (some_g.mT @ some_a).square_().sum(0)
    return total


class LayerInverses(ABC):
    """How the damped matrix of a layer is inverted."""

    needs_cases = False
    """Whether :meth:`take` is to be called."""

    @abstractmethod
    def inverse(self, block: Block, damping: float) -> Inverse:
        """(block + damping I)⁻¹, or what stands for it."""

    def take(self, blocks: Sequence[Block], seen: Sequence[Seen], keep: float) -> None:  # noqa: B027 (few learn)
        """Learn from what layers have seen in one refresh; the past counts ``keep``."""

    def state_dict(self) -> list[dict[str, Any]]:
        """What was learnt."""
        return []

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:  # noqa: B027 (few have learnt)
        """The inverse of :meth:`state_dict`."""


@dataclass(frozen=True)
class FactoredDamping(LayerInverses):
    """(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ with π² = (tr A / dim A) / (tr G / dim G): the damping is shared by the factors.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), section 6.3.
    """

    def inverse(self, block: Block, damping: float) -> Inverse:
        a, g = block.inputs.double(), block.outputs.double()
        # Numbers stay on the device, which need not be waited for.
        mean_a, mean_g = (m.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) for m in (a, g))
        balance, root = (mean_a / mean_g).sqrt(), math.sqrt(damping)
        shifts = torch.maximum(balance * root, _LEAST * mean_a), torch.maximum(root / balance, _LEAST * mean_g)
        of_inputs, of_outputs = (m.to(block.inputs.dtype) for m in _shifted_inverses((a, g), shifts))
        return partial(_between, of_outputs, of_inputs)


@dataclass(frozen=True)
class TikhonovDamping(LayerInverses):
    """(A ⊗ G + λI)⁻¹ itself, by the eigenvectors of the factors.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), appendix B.
    """

    def inverse(self, block: Block, damping: float) -> Inverse:
        return decomposed(block).inverse(damping)


class EigenbasisMoments(LayerInverses):
    """The eigenvectors of Kronecker factors with running means of squared gradients of cases in them.

    Args:
        every: updates of the factors between two decompositions, >= 1; in other eigenvectors the means go on as the
            diagonal of the matrix that they were.
    """

    needs_cases = True

    def __init__(self, every: int) -> None:
        self._every = every
        self._blocks: dict[int, EigenBlock] = {}
        self._ages: dict[int, int] = {}

    def inverse(self, block: Block, damping: float) -> Inverse:
        known = self._blocks.get(block.weight)
        return (decomposed(block) if known is None else known).inverse(damping)

    def take(self, blocks: Sequence[Block], seen: Sequence[Seen], keep: float) -> None:
        for block in blocks:
            old, age = self._blocks.get(block.weight), self._ages.get(block.weight, 0)
            fresh = old is None or old.values.shape != (len(block.outputs), len(block.inputs)) or old.bias != block.bias
            basis = decomposed(block) if old is None or fresh or age >= self._every else old
            squares = torch.zeros_like(basis.values)
            for weight, uses in seen:
                own = [(use, g) for use, g in uses if use.weight == block.weight]
                squares += weight * squared_cases(basis, own)
            if not bool(squares.sum().isfinite()):
                continue
            if old is not None and not fresh:
                squares = keep * (old.values if basis is old else old.turned(basis)) + (1 - keep) * squares
            self._blocks[block.weight] = replace(basis, values=squares)
            self._ages[block.weight] = age + 1 if basis is old else 1

    def state_dict(self) -> list[dict[str, Any]]:
        return [{**vars(b), "age": self._ages[at]} for at, b in self._blocks.items()]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._ages = {saved["weight"]: saved["age"] for saved in state}
        whole = [{name: value for name, value in saved.items() if name != "age"} for saved in state]
        self._blocks = {saved["weight"]: EigenBlock(**saved) for saved in whole}


def _between(outputs: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    return outputs @ matrix @ inputs


def _shifted_inverses(matrices: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Tensor]:
    """(M + shift I)⁻¹ of positive semidefinite M; a shift grows where rounding has made its M indefinite."""
    factored = [_factored(m, shift) for m, shift in zip(matrices, shifts, strict=True)]
    for at, failed in enumerate(torch.stack([info for _, info in factored]).tolist()):
        shift = shifts[at]
        while failed:
            shift = 10 * shift
            factored[at] = _factored(matrices[at], shift)
            failed = int(factored[at][1])
    return [torch.cholesky_inverse(factor) for factor, _ in factored]


def _factored(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor of M + shift I, and 0 where there is one."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + shift * identity)
    return factor, info
