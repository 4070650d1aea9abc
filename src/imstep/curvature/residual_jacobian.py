"""The Jacobian of a loss's residuals and its Gram matrix, without a backward pass per residual."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from imstep.complexstep.later import as_evaluated
from imstep.curvature.frozen import Closure, FrozenClosure
from imstep.curvature.gradient_rows import Form, GradientRows
from imstep.curvature.known_rows import known_rows
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.writing_out import Evaluation, write_out
from imstep.linalg import GramMatrix, RowMatrix, ScaledRows
from imstep.linalg.precision import coarsest_eps, full_precision

F64 = torch.float64
_CHUNK = 256
"""Rows of a Gram matrix at a time."""


class JacobianRows(RowMatrix):
    """A matrix J of N rows, one gradient each, kept parameter by parameter: shape (N, n), float64.

    Args:
        parts: the rows with respect to each parameter, in order; None where all are zero.
        sizes: entries of each parameter.
        count: N.
        device: of the rows.
    """

    def __init__(
        self, parts: Sequence[GradientRows | None], sizes: Sequence[int], count: int, device: torch.device
    ) -> None:
        super().__init__((count, sum(sizes)), F64, device)
        self._parts, self._sizes = list(parts), list(sizes)

    def matvec(self, vector: Tensor) -> Tensor:
        image = vector.new_zeros(self.shape[0])
        for part, piece in zip(self._parts, vector.split(self._sizes), strict=True):
            if part is not None:
                image += part.matvec(piece)
        return image

    def rmatvec(self, vector: Tensor) -> Tensor:
        pieces = zip(self._parts, self._sizes, strict=True)
        return torch.cat([vector.new_zeros(n) if part is None else part.rmatvec(vector) for part, n in pieces])

    def rows(self, index: Tensor) -> JacobianRows:
        """The rows at ``index`` (k,)."""
        parts = [None if part is None else part.select(index) for part in self._parts]
        return JacobianRows(parts, self._sizes, len(index), self.device)

    def squared_norm(self) -> float:
        sums = [part.squared_norms.sum() for part in self._parts if part is not None]
        return sum(torch.stack(sums).tolist()) if sums else 0.0

    def written_out(self) -> Tensor:
        empty = lambda n: torch.zeros(self.shape[0], n, dtype=F64, device=self.device)
        parts = zip(self._parts, self._sizes, strict=True)
        return torch.cat([empty(n) if part is None else part.written_out() for part, n in parts], 1)

    def sketched(self, width: int, generator: torch.Generator) -> Tensor:
        image = torch.zeros(self.shape[0], width, dtype=F64, device=self.device)
        for part in self._parts:
            if part is not None:
                image += part.sketched(width, generator)
        return image

    def in_units(self, units: Tensor) -> RowMatrix:
        """J D⁻¹ for D (n,) > 0; as compact as J where D has one entry for each parameter."""
        pieces = units.split(self._sizes)
        if not all(bool((piece == piece[0]).all()) for piece in pieces if len(piece)):
            return ScaledRows(self, units)
        return self._over([float(piece[0]) if len(piece) else 1.0 for piece in pieces])

    def times(self, factor: float) -> JacobianRows:
        """The rows times a factor > 0."""
        return self._over([1 / factor] * len(self._sizes))

    def _over(self, divisors: Sequence[float]) -> JacobianRows:
        pairs = zip(self._parts, divisors, strict=True)
        parts = [None if part is None else part.over(divisor) for part, divisor in pairs]
        return JacobianRows(parts, self._sizes, self.shape[0], self.device)

    @property
    def forms(self) -> list[Form | None]:
        """In which the rows of each parameter are sent; None where all are zero."""
        return [None if part is None else part.form for part in self._parts]

    def packed(self, form: Sequence[Form | None]) -> Tensor:
        pairs = [(part, of) for part, of in zip(self._parts, form, strict=True) if of is not None]
        zeros = lambda width: torch.zeros(self.shape[0], width, dtype=F64, device=self.device)
        return torch.cat([zeros(of.width) if part is None else part.packed(of) for part, of in pairs], 1)

    def unpacked(self, packed: Tensor, form: Sequence[Form | None]) -> JacobianRows:
        pieces = iter(packed.split([of.width for of in form if of is not None], 1))
        parts = [None if of is None else of.unpacked(next(pieces)) for of in form]
        return JacobianRows(parts, self._sizes, len(packed), self.device)

    def gram(self) -> Gram:
        """J Jᵀ, (N, N)."""
        return Gram(self, [part for part in self._parts if part is not None])


class Gram(GramMatrix):
    """J Jᵀ for rows J; what `J.gram()` builds.

    Args:
        rows: J.
        parts: its rows with respect to each parameter.
    """

    def __init__(self, rows: JacobianRows, parts: Sequence[GradientRows]) -> None:
        super().__init__(rows.shape[0], rows.dtype, rows.device)
        self._rows, self._parts = rows, parts
        self._whole: Tensor | None = None

    def matvec(self, vector: Tensor) -> Tensor:
        return self._rows.matvec(self._rows.rmatvec(vector))

    def matmat(self, block: Tensor) -> Tensor:
        """K V: by K itself, which is kept, where that takes fewer multiplications than J (Jᵀ V) does."""
        size, columns = block.shape
        counts = [part.multiplications for part in self._parts]
        image, entry = sum(of_image for of_image, _ in counts), sum(of_gram for _, of_gram in counts)
        if self._whole is None and 2 * image * columns < (entry / 2 + columns) * size:
            return super().matmat(block)
        return self.dense() @ block

    def diagonal(self) -> Tensor:
        none = torch.zeros(self.size, dtype=F64, device=self.device)
        return sum((part.squared_norms for part in self._parts), none)

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        count = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        block = torch.zeros(count, len(columns), dtype=F64, device=self.device)
        for part in self._parts:
            part.add_gram(block, rows, columns)
        return block

    def principal(self, index: Tensor) -> Tensor:
        return self._rows.rows(index).gram().dense()

    def dense(self) -> Tensor:
        """K itself, (N, N), computed once: the lower triangle, in chunks of rows, and its mirror image."""
        if self._whole is not None:
            return self._whole
        whole = torch.zeros(self.size, self.size, dtype=F64, device=self.device)
        for start in range(0, self.size, _CHUNK):
            end = min(start + _CHUNK, self.size)
            for part in self._parts:
                part.add_gram(whole[start:end, :end], slice(start, end), slice(0, end))
            whole[:start, start:end] = whole[start:end, :start].mT
            corner = whole[start:end, start:end]
            corner.copy_(corner.tril() + corner.tril(-1).mT)
        self._whole = whole
        return whole


class ResidualJacobian(JacobianRows):
    """J = ∂ρ/∂w of the residuals ρ of a loss f = ρᵀρ/2, at the parameters' values when it was built.

        g = Jᵀρ,   Gauss-Newton matrix = JᵀJ,   Gram matrix = JJᵀ

    Where the gradient of a layer's weight is a sum of few outer products per residual, J is kept as their factors, and
    JJᵀ takes N² (in + out) multiplications for a pair of uses of the weight instead of N² in · out. The factors are
    found in autograd's graph, so that a loss may take derivatives of the model with respect to its inputs.

    Args:
        closure: returns the loss, a sum of squares by sums, means and positive factors, of residuals that are computed
            independently of each other; it may also call ``zero_grad()`` and ``backward()``.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.

    Attributes:
        loss: f(w), a 0-dim tensor.
        residuals: ρ, (N,), float64.
        terms: how many of them each term of the loss has, that is, each square that the closure writes, in order.
        rest: what the loss is more than ρᵀρ/2, where it adds constants to squares; None where it does not.
        evaluations: of the closure; 1, or 2 where only the first showed that columns are wanted.
        backward_passes: how many it took to build; a forward product counts as one.
        used: whether the residuals depend on each parameter.
        course: how the residuals came about.
        explicit: positions of parameters whose uses were not recognised, and whose part of J is written out.
        hooked: whether hooks set entries of gradients to zero.
        eps: rounding of the residuals, that of the coarsest dtype among loss, parameters and what is squared.

    Raises:
        NoResidualsError: the loss is no sum of squares; or the residuals depend on each other, as with batch
            normalisation, and J is too large to be written out.
        ValueError: the loss depends on none of the parameters.

    Cost: a forward pass; three to five backward passes. For the n' entries of ``explicit`` n' forward products at once
        by the complex step, or N backward passes in blocks, whichever are fewer. Arithmetic on rows is float64
        whatever the parameters' dtype, since JJᵀ has the square of J's condition.

    Source: our own.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> J = ResidualJacobian(lambda: model(x).square().sum() / 2, model)
        >>> J.gram().dense()
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)
    """

    def __init__(self, closure: Closure, params: nn.Module | Iterable[Tensor]) -> None:
        parameters = ParameterVector(params)
        frozen = FrozenClosure(closure, parameters)
        try:
            self._fill(frozen, parameters, KnownOwners())
        finally:
            frozen.leave(accepted=True)

    @property
    def gradient(self) -> Tensor:
        """Jᵀρ, (n,)."""
        return self.rmatvec(self.residuals)

    @classmethod
    def at(cls, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> ResidualJacobian:
        """From a closure that has not been evaluated on its batch yet.

        Args:
            known: what earlier Jacobians have found, which saves passes; taken up and completed.
        """
        self = cls.__new__(cls)
        self._fill(frozen, parameters, known)
        return self

    @full_precision
    @as_evaluated()
    def _fill(self, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> None:
        before = frozen.losses
        evaluation = Evaluation.of(frozen, parameters, known)
        residuals, tensors = evaluation.residuals, parameters.tensors
        parts, wrong, check = known_rows(evaluation, tensors, known)
        for at, part in zip(wrong, write_out(evaluation, wrong, frozen, parameters, known, check), strict=True):
            parts[at] = part
        self.terms = residuals.sizes
        self.rest = float(residuals.whole[-1]) if len(residuals.whole) > len(residuals.values) else None
        self.loss, self.residuals, self.explicit = evaluation.loss.detach(), residuals.values.double(), tuple(wrong)
        self.backward_passes, self.evaluations = residuals.passes, frozen.losses - before
        self.course = evaluation.course
        self.eps = coarsest_eps([evaluation.loss, *tensors, *(o.z for o in residuals.outputs)])
        self.used = [part is not None for part in parts]
        frozen.user.take_hooks(None if check is None else check.masks)
        self.hooked = frozen.hook_factors is not None
        super().__init__(parts, parameters.sizes, len(residuals.values), parameters.device)

    def weighted(self, weights: Tensor) -> ResidualJacobian:
        """That of the loss ½ Σ weights_i ρ_i², weights (N,) > 0; kept as compactly, without an evaluation."""
        factors = weights.sqrt()
        other = copy.copy(self)
        other._parts = [None if part is None else part.over(1 / factors[:, None]) for part in self._parts]
        other.residuals = factors * self.residuals
        other.loss = (other.residuals.square().sum() / 2).to(self.loss)
        return other
