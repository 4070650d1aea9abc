"""A Gaussian posterior of a model's weights about their trained values, and the error bars that it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.operators import SymmetricOperator
from imstep.insight.outputs import Outputs, linearised, parameters_of, rows_of
from imstep.linalg import LinearOperator
from imstep.spectral import Estimate, eigenpairs, log_determinant
from imstep.uncompiled import uncompiled


@dataclass(frozen=True, eq=False)
class Predictive:
    """The distribution of a model's outputs z under a posterior, without the noise of observations.

    Attributes:
        mean: the outputs of the trained model, of their shape.
        covariance: of all outputs with each other, (m, m), in row-major order of the outputs.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Of each output, of their shape."""
        return self.covariance.diagonal().reshape(self.mean.shape)

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Draws of the outputs, (count, *shape): softmax them and take the mean for the probabilities of classes."""
        generator = torch.Generator(self.mean.device).manual_seed(seed)
        values, vectors = torch.linalg.eigh(self.covariance.double())
        shape, device = (count, len(values)), self.mean.device
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        moved = (drawn * values.clamp(min=0).sqrt()) @ vectors.mT
        return self.mean + moved.reshape(count, *self.mean.shape).to(self.mean)


@uncompiled
class Laplace:
    """The Laplace approximation: a Gaussian about the trained weights, with the curvature of the loss as precision.

        p(w | data) ≈ N(w*, Σ),   Σ = (N A + τI)⁻¹

    Which approximation it is, the matrix says: a Fisher matrix of all parameters (full), of a module at the end (last
    layer), K-FAC or EKFAC (Kronecker), :func:`imstep.spectral.low_rank` of one, or ``block_diagonal``.

    Args:
        curvature: A, of the *mean* of -log p(y | z) over the cases, positive semidefinite: a :class:`~imstep.Fisher`,
            or a Gauss-Newton matrix of such a loss; without penalties.
        cases: N, >= 1.
        prior_precision: τ > 0 of the prior N(0, I/τ); training by the mean of -log p has this prior with a penalty of
            τ / (2N) ‖w‖², which is ``weight_decay=τ/N``.
        rtol: of the solves, as for :meth:`~imstep.linalg.LinearOperator.inverse`.

    Attributes:
        covariance: Σ, an operator.

    Raises:
        ValueError: an argument out of range; the matrix belongs to no parameters; N A + τI is not positive definite.

    Cost: that of the smallest eigenvalue, unless the matrix is known to be positive semidefinite.

    Source: MacKay, Neural Computation 4 (1992), 448-472; Daxberger, Kristiadi, Immer, Eschenhagen, Bauer and Hennig,
    NeurIPS 2021 (arXiv 2106.14806).

    Example:
        >>> import imstep
        >>> from imstep.curvature import Gaussian
        >>> w, x = torch.nn.Parameter(torch.tensor([1.0])), torch.tensor([1.0, 2.0, 2.0])
        >>> F = imstep.Fisher(lambda: (w * x, x), [w], Gaussian())
        >>> posterior = Laplace(F, cases=3, prior_precision=1.0)
        >>> posterior.covariance.to_dense()  # 1 / (1 + 4 + 4 + 1)
        tensor([[0.1000]])
        >>> posterior.predictive(lambda: w * torch.tensor([3.0])).variance
        tensor([0.9000])
    """

    def __init__(
        self, curvature: LinearOperator, cases: int, prior_precision: float, *, rtol: float | None = None
    ) -> None:
        if torch.is_tensor(prior_precision) and prior_precision.numel() != 1:
            raise ValueError(
                f"prior_precision is one number for all weights, got {prior_precision.numel()}. Scale the weights by "
                "layer, or take the Laplace approximation of one layer."
            )
        prior_precision = float(prior_precision)
        if cases < 1 or not 0 < prior_precision < math.inf:
            raise ValueError(
                f"cases is at least 1 and prior_precision positive, got {cases} and {prior_precision}. Without a prior "
                "the posterior of what the data do not determine is infinitely wide."
            )
        self.parameters = parameters_of(curvature)
        _check_definite(curvature, prior_precision / cases)
        self.curvature, self.cases, self.prior_precision = curvature, cases, prior_precision
        self.covariance = curvature.inverse(prior_precision / cases, rtol=rtol) * (1 / cases)

    def predictive(self, outputs: Outputs) -> Predictive:
        """The distribution of outputs, the model taken as linear in its weights about the trained ones.

            N(z(w*), J Σ Jᵀ)

        Args:
            outputs: a closure that returns m outputs, or their Jacobian.

        Raises:
            NotSolvedError: a solve did not succeed.

        Cost: a backward pass and a solve for each output.

        Source: Immer, Korzepa and Bauer, AISTATS 2021 (arXiv 2008.08171).
        """
        jacobian = linearised(outputs, self.curvature)
        covariance = jacobian @ (self.covariance @ rows_of(jacobian))
        return Predictive(jacobian.outputs, (covariance + covariance.mT) / 2)

    def log_evidence(self, log_likelihood: float, *, rtol: float = 1e-2, seed: int = 0) -> Estimate:
        """The logarithm of the marginal likelihood, by which priors and models can be compared.

            log p(data) ≈ Σ log p(yᵢ | zᵢ) - τ/2 ‖w‖² + n/2 log τ - 1/2 log det(N A + τI)

        Args:
            log_likelihood: Σ log p(yᵢ | zᵢ) at the trained weights, with its constants.
            rtol: error, relative to the logarithm itself, below which it counts as converged.
            seed: of the estimate of the determinant; exact for small models.

        Returns:
            An :class:`~imstep.spectral.Estimate`.

        Raises:
            ValueError: N A + τI is found not to be positive definite.

        Source: MacKay, Neural Computation 4 (1992), 448-472; Immer, Bauer, Fortuin, Rätsch and Khan, ICML 2021 (arXiv
        2104.04975).
        """
        size, precision = self.parameters.size, self.prior_precision
        found = log_determinant(self.curvature, precision / self.cases, seed=seed)
        determinant = found.value + size * math.log(self.cases)
        prior = size / 2 * math.log(precision) - precision / 2 * self.parameters.norm() ** 2
        value = log_likelihood + prior - determinant / 2
        return Estimate(value, found.error / 2, found.products, found.error / 2 <= rtol * abs(value))


def _check_definite(curvature: LinearOperator, damping: float) -> None:
    """Raise where A + λI is found to have an eigenvalue that is not positive."""
    if isinstance(curvature, SymmetricOperator) and curvature.definite:
        return
    least = float(eigenpairs(curvature, 1, "SA", 1e-3).values[0])
    if not least + damping > 0:
        raise ValueError(
            f"the curvature has the eigenvalue {least:.3g}, which the prior does not outweigh: N A + τI is not "
            "positive definite, and no Gaussian has it as its precision. Pass a Fisher or Gauss-Newton matrix, or "
            "train to a minimum."
        )
