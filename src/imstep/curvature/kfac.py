"""Kronecker-factored approximations of the Gauss-Newton matrix, as operators with products and exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from imstep.complexstep.later import later_grad
from imstep.curvature.frozen import Closure, FrozenClosure
from imstep.curvature.kronecker import KroneckerFactors
from imstep.curvature.kronecker_blocks import EigenBlock, decomposed, disjoint, squared_cases
from imstep.curvature.layers import LayerObserver
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.sampling import pulled, sample_output_gradients
from imstep.linalg import KrylovStatus, LinearOperator
from imstep.linalg.inverse import DirectSolver
from imstep.linalg.space import Space
from imstep.uncompiled import uncompiled


@uncompiled
class KFAC(LinearOperator):
    """The Kronecker-factored approximation of a loss's Gauss-Newton matrix, layer by layer.

        block of a layer = A ⊗ G,   A = E[a aᵀ] of its inputs,   G = Σ E[g gᵀ] of sampled gradients at its outputs

    Rows of inputs whose outputs the loss ignores, such as those of padding, are left out of the expectation. Linear and
    recurrent layers and convolutions (1d and 2d, one group) have factors; all other parameters, those of recurrent
    layers in a checkpoint, and those of a model in TorchScript, whose layers are not seen, a diagonal, of squared
    gradients of the same samples; ``blocks`` tells. Weight decay that is part of the loss, or a pull towards other
    values or weights, is added by its mean over a weight; that of a layer's weight counts for its bias, too. Products
    and inverses are exact for this matrix, in the factors' eigenvectors.

    Args:
        closure: returns the loss, a convex function of the model's outputs made of PyTorch's mean squared error, cross
            entropy, binary cross entropy, Huber losses and the like by sums, means and positive factors.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.
        samples: targets drawn for each case, >= 1.
        seed: of the generator they come from.
        largest: widest input or output of a layer that has factors.

    Attributes:
        loss: f(w), 0-dim.
        blocks: of the layers that have factors.

    Raises:
        ValueError: the loss is not recognised as convex; as for :class:`ParameterVector`.

    Cost: ``samples`` evaluations of the closure, each with a backward pass more; in³ + out³ operations a layer. A
        product: 2 in out (in + out) multiplications a layer.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), section 3; for convolutions Grosse and Martens, ICML 2016
        (arXiv 1602.01407).

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
        >>> K = KFAC(lambda: model(x).square().mean(), model)
        >>> K.to_dense().round(decimals=3)  # 2/2 XᵀX
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(
        self,
        closure: Closure,
        params: nn.Module | Iterable[Tensor],
        *,
        samples: int = 1,
        seed: int = 0,
        largest: int = 4096,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples, the targets drawn for each case, is at least 1, got {samples}.")
        self.parameters = ParameterVector(params)
        super().__init__(self.parameters.size, self.parameters.dtype, self.parameters.device)
        self._frozen, self._largest = FrozenClosure(closure, self.parameters), largest
        generator = torch.Generator(self.device).manual_seed(seed)
        factors = KroneckerFactors(self.parameters, decay=1 - 1 / (samples + 1), alone=True)
        try:
            for _ in range(samples):
                point, observer = self._evaluate()
                factors.update(point, observer, generator)
            self.loss = point.loss.detach()
            self.blocks = [decomposed(block) for block in disjoint(factors.blocks())]
            self.blocks = [
                replace(block, values=block.values + factors.direct(block.weight))
                for block in self._rescaled(self.blocks, samples, generator)
            ]
        finally:
            self._frozen.leave(accepted=True)
        layered = {at for block in self.blocks for at in (block.weight, block.bias)}
        self._diagonals = {at: d for at, d in factors.diagonals().items() if at not in layered}

    def _evaluate(self) -> tuple[Linearisation, LayerObserver]:
        observer = LayerObserver(self.parameters.tensors, self._largest)
        point = self._frozen.linearise(observer)
        if point.split is None:
            raise ValueError(
                "Kronecker factors are of a loss that is a convex function of outputs, and this one is not recognised "
                "as such. Build it from mean squared errors, cross entropies and the like, and write logarithms of "
                "probabilities as cross_entropy, log_softmax, binary_cross_entropy_with_logits, logsigmoid or softplus "
                "of outputs, with clamp(min=eps) of a probability p in place of p + eps; or use GaussNewton."
            )
        return point, observer

    def _rescaled(self, blocks: list[EigenBlock], samples: int, generator: torch.Generator) -> list[EigenBlock]:
        """The blocks with other values in the same eigenvectors."""
        return blocks

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self.parameters, self.parameters

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        return self.scaled(block.mT, lambda values: values).mT

    def scaled(self, rows: Tensor, factors: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows (k, n) multiplied by a function of the matrix."""
        made = torch.zeros_like(rows)
        given, into = (t.split(self.parameters.sizes, dim=1) for t in (rows, made))
        covered = {at for block in self.blocks for at in (block.weight, block.bias)}
        for at in set(range(len(given))) - covered:
            d = self._diagonals.get(at, rows.new_zeros(given[at].shape[1]))
            into[at].copy_(given[at] * factors(d.reshape(-1).to(rows)))
        for block in self.blocks:
            matrices = given[block.weight].reshape(len(rows), len(block.outputs), -1)
            if block.bias is not None:
                matrices = torch.cat([matrices, given[block.bias][:, :, None]], dim=2)
            solved = block.applied(matrices, factors(block.values))
            if block.bias is not None:
                into[block.bias].copy_(solved[:, :, -1])
                solved = solved[:, :, :-1]
            into[block.weight].copy_(solved.reshape(len(rows), -1))
        return made

    def preconditioner(self, damping: float) -> LinearOperator:
        """P = (matrix + λI)⁻¹ for a solver, λ > 0: as `inverse`, without the checks of its solutions."""
        if not damping > 0:
            raise ValueError(f"a preconditioner is definite only with a damping above 0, got {damping}.")
        return _ByEigenvalues(self, damping)

    def direct_solver(self, damping: float, rtol: float | None, max_iterations: int) -> DirectSolver:
        """By the eigenvalues of the factors: exact but for rounding."""
        return _ByEigenvalues(self, damping)


@uncompiled
class EKFAC(KFAC):
    """As :class:`KFAC`, with the eigenvalues of each layer replaced by the best ones in the same eigenvectors.

        s = Σ E[(Gᵀ D A)²],   D the gradient of the weight, of one case with a sampled target

    In Frobenius norm the matrix is nearer to that of Gauss-Newton than that of K-FAC.

    Args:
        closure, params, samples, seed, largest: as for :class:`KFAC`. Cases are along the first dimension of a layer's
            output.

    Cost: twice that of :class:`KFAC` to build.

    Source: George, Laurent, Bouthillier, Ballas and Vincent, NeurIPS 2018 (arXiv 1806.03884).

    Example:
        >>> model, x = nn.Linear(1, 2, bias=False), torch.tensor([[1.0], [2.0]])
        >>> EKFAC(lambda: (model(x) * torch.tensor([1.0, 2.0])).square().mean(), model).to_dense().diagonal()
        tensor([ 2.5000, 10.0000])
    """

    def _rescaled(self, blocks: list[EigenBlock], samples: int, generator: torch.Generator) -> list[EigenBlock]:
        totals = [torch.zeros_like(block.values) for block in blocks]
        for _ in range(samples if blocks else 0):
            point, observer = self._evaluate()
            assert point.split is not None
            ends = point.split.losses
            outputs, u = pulled(ends, sample_output_gradients(point.loss, ends, generator))
            edges = [use.edge for use in observer.uses]
            found = later_grad(outputs, edges, u, keep=point.keeps_graph)
            for total, block in zip(totals, blocks, strict=True):
                own = [(use, g) for use, g in zip(observer.uses, found, strict=True) if use.weight == block.weight]
                total += squared_cases(block, [(use, use.gradient(g)) for use, g in own]) / samples
        return [replace(block, values=values) for block, values in zip(blocks, totals, strict=True)]


class _ByEigenvalues(LinearOperator, DirectSolver):
    """(A + λI)⁻¹ of a matrix whose eigenvalues are known, unchecked."""

    def __init__(self, matrix: KFAC, damping: float) -> None:
        super().__init__(matrix.size, matrix.dtype, matrix.device)
        self._matrix, self._damping = matrix, damping
        largest = max([0.0, *(float(block.values.max()) for block in matrix.blocks)])
        self._level = 0.0 if damping > 0 else torch.finfo(matrix.dtype).eps * largest

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        shifted = lambda values: values + self._damping
        # What has no curvature but rounding and no damping has no inverse: left out, and seen by the residual.
        reciprocal = lambda values: torch.where(shifted(values) > self._level, 1 / shifted(values), 0.0)
        return self._matrix.scaled(block.mT, reciprocal).mT

    def solve(self, rows: Tensor) -> tuple[Tensor, list[KrylovStatus]]:
        return self.matmat(rows.mT).mT, [KrylovStatus.CONVERGED] * len(rows)
