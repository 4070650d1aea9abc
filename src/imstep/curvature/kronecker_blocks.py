"""Matrices of single layers as Kronecker products, and how their damped inverses are made."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from imstep.curvature.layers import LayerUse
from imstep.linalg.sharded import ShardedTensor, own_entries

if TYPE_CHECKING:
    from imstep.curvature.kronecker_sharing import Sharing

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
        inputs: A = E[a aᵀ] over the rows a that the weight multiplies and the loss depends on, (in, in).
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


AnyBlock = TypeVar("AnyBlock", Block, EigenBlock)


def decomposed(block: Block, parts: Sequence[Tensor] | None = None) -> EigenBlock:
    """G ⊗ A in its eigenvectors, by those of its factors, (n + 1, n) each with eigenvalues last."""
    known = parts or [_eigen(m) for m in (block.inputs, block.outputs)]
    (inputs, a), (outputs, g) = ((part[:-1], part[-1]) for part in known)
    values = g.clamp(min=0)[:, None] * a.clamp(min=0)
    # Contiguous, as they come back from a file: products of other layouts round otherwise.
    own = (t.to(block.inputs.dtype).contiguous() for t in (inputs, outputs, values))
    return EigenBlock(block.weight, block.bias, *own)


def locally(block: AnyBlock) -> AnyBlock:
    """A block with matrices as plain tensors, where this process has them."""
    matrices: Any = {name: own_entries(value) for name, value in vars(block).items() if isinstance(value, Tensor)}
    return replace(block, **matrices)


def disjoint(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, a bias that several layers share being part of the first only."""
    taken: set[int] = set()
    disjoint = []
    for b in blocks:
        if b.bias in taken:
            b = Block(b.weight, None, _trimmed(b.inputs), b.outputs)
        if b.bias is not None:
            taken.add(b.bias)
        disjoint.append(b)
    return disjoint


def _trimmed(inputs: Tensor) -> Tensor:
    """Without the last row and column; in the process that has them, if it is one of several."""
    if not isinstance(inputs, ShardedTensor):
        return inputs[:-1, :-1]
    return ShardedTensor(inputs.own[:-1, :-1], inputs.cut.shortened(), 0)


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


def _squares(basis: EigenBlock, seen: Sequence[Seen]) -> Tensor:
    """As :func:`squared_cases`, of all evaluations, each counted with its weight."""
    total = torch.zeros_like(basis.values)
    for weight, uses in seen:
        total += weight * squared_cases(basis, [(use, g) for use, g in uses if use.weight == basis.weight])
    return total


@dataclass(frozen=True)
class Work:
    """A matrix to be computed from one factor.

    Attributes:
        factor: (n, n); the cost is n³.
        shape: of what comes of it.
        dtype: of what comes of it.
        compute: computes it.
    """

    factor: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


def _all_squares(bases: Sequence[EigenBlock], seen: Sequence[Seen]) -> Tensor:
    return torch.cat([_squares(basis, seen).reshape(-1) for basis in bases])


def _basis(block: Block, known: EigenBlock | None) -> EigenBlock:
    return decomposed(locally(block)) if known is None else locally(known)


class LayerInverses(ABC):
    """How the damped matrix of a layer is inverted."""

    needs_cases = False
    """Whether :meth:`take` is to be called."""

    def work(self, block: Block, damping: float) -> list[Work]:
        """What is to be computed for :meth:`inverse`, and can be shared out."""
        return []

    @abstractmethod
    def inverse(self, block: Block, damping: float, parts: Sequence[Tensor] | None = None) -> Inverse:
        """(block + damping I)⁻¹, or what stands for it; of ``parts``, where :meth:`work` is done."""

    def take(  # noqa: B027 (few learn)
        self, blocks: Sequence[Block], seen: Sequence[Seen], keep: float, sharing: Sharing
    ) -> None:
        """Learn from what layers have seen in one refresh, in each of several processes; the past counts ``keep``."""

    def state_dict(self) -> list[dict[str, Any]]:
        """What was learnt."""
        return []

    def load_state_dict(self, state: list[dict[str, Any]], sharing: Sharing) -> None:  # noqa: B027 (few have learnt)
        """The inverse of :meth:`state_dict`."""


@dataclass(frozen=True)
class FactoredDamping(LayerInverses):
    """(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ with π² = (tr A / dim A) / (tr G / dim G): the damping is shared by the factors.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), section 6.3.
    """

    def work(self, block: Block, damping: float) -> list[Work]:
        return [
            Work(m, (len(m), len(m)), m.dtype, partial(_alone, m, shift))
            for m, shift in zip((block.inputs, block.outputs), _shifts(block, damping), strict=True)
        ]

    def inverse(self, block: Block, damping: float, parts: Sequence[Tensor] | None = None) -> Inverse:
        factors = block.inputs, block.outputs
        of_inputs, of_outputs = parts or _shifted_inverses(factors, _shifts(block, damping))
        return partial(_between, of_outputs, of_inputs)


@dataclass(frozen=True)
class TikhonovDamping(LayerInverses):
    """(A ⊗ G + λI)⁻¹ itself, by the eigenvectors of the factors.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), appendix B.
    """

    def work(self, block: Block, damping: float) -> list[Work]:
        double = torch.float64
        return [Work(m, (len(m) + 1, len(m)), double, partial(_eigen, m)) for m in (block.inputs, block.outputs)]

    def inverse(self, block: Block, damping: float, parts: Sequence[Tensor] | None = None) -> Inverse:
        return decomposed(block, parts).inverse(damping)


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

    def inverse(self, block: Block, damping: float, parts: Sequence[Tensor] | None = None) -> Inverse:
        known = self._blocks.get(block.weight)
        return (decomposed(block) if known is None else locally(known)).inverse(damping)

    def take(self, blocks: Sequence[Block], seen: Sequence[Seen], keep: float, sharing: Sharing) -> None:
        for some in sharing.at_once(blocks):
            olds = [self._known(block) for block in some]
            fresh = [old is None or self._ages[old.weight] >= self._every for old in olds]
            bases = [
                sharing.basis(block, partial(_basis, block, None if new else old))
                for block, old, new in zip(some, olds, fresh, strict=True)
            ]
            sizes = [basis.values.numel() for basis in bases]
            found = sharing.added(partial(_all_squares, bases, seen), sum(sizes), bases[0].values).split(sizes)
            for basis, old, new, squares in zip(bases, olds, fresh, found, strict=True):
                squares = squares.view_as(basis.values)
                if bool(squares.sum().isfinite()):
                    if old is not None and sharing.mine(basis.weight):
                        past = locally(old).turned(basis) if new else basis.values
                        squares = keep * past + (1 - keep) * squares
                    self._blocks[basis.weight] = sharing.held(replace(basis, values=squares))
                    self._ages[basis.weight] = 1 if new else self._ages[basis.weight] + 1

    def _known(self, block: Block) -> EigenBlock | None:
        """What is known of a block, if it has the same form still."""
        old, shape = self._blocks.get(block.weight), (len(block.outputs), len(block.inputs))
        return old if old is not None and old.values.shape == shape and old.bias == block.bias else None

    def state_dict(self) -> list[dict[str, Any]]:
        return [{**vars(b), "age": self._ages[at]} for at, b in self._blocks.items()]

    def load_state_dict(self, state: list[dict[str, Any]], sharing: Sharing) -> None:
        self._ages = {saved["weight"]: saved["age"] for saved in state}
        whole = [{name: value for name, value in saved.items() if name != "age"} for saved in state]
        self._blocks = {saved["weight"]: sharing.held(EigenBlock(**saved)) for saved in whole}


def _between(outputs: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    return outputs @ matrix @ inputs


def _eigen(matrix: Tensor) -> Tensor:
    """Eigenvectors and, as a last row, eigenvalues, (n + 1, n), float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return torch.cat([vectors, values[None]])


def _shifts(block: Block, damping: float) -> tuple[Tensor, Tensor]:
    """What is added to the diagonals of both factors; numbers stay on the device, which need not be waited for."""
    tiny = torch.finfo(torch.float32).tiny
    mean_a, mean_g = (m.double().diagonal().mean().clamp(min=tiny) for m in (block.inputs, block.outputs))
    balance, root = (mean_a / mean_g).sqrt(), math.sqrt(damping)
    return torch.maximum(balance * root, _LEAST * mean_a), torch.maximum(root / balance, _LEAST * mean_g)


def _shifted_inverses(factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Tensor]:
    """(M + shift I)⁻¹ of positive semidefinite M; a shift grows where rounding has made its M indefinite."""
    matrices = [factor.double() for factor in factors]
    factored = [_factored(m, shift) for m, shift in zip(matrices, shifts, strict=True)]
    for at, failed in enumerate(torch.stack([info for _, info in factored]).tolist()):
        shift = shifts[at]
        while failed:
            shift = 10 * shift
            factored[at] = _factored(matrices[at], shift)
            failed = int(factored[at][1])
    found = [torch.cholesky_inverse(factor) for factor, _ in factored]
    return [m.to(factor.dtype) for m, factor in zip(found, factors, strict=True)]


def _alone(factor: Tensor, shift: Tensor) -> Tensor:
    return _shifted_inverses([factor], [shift])[0]


def _factored(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor of M + shift I, and 0 where there is one."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + shift * identity)
    return factor, info
