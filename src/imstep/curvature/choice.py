"""Which matrix stands for the curvature of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from imstep.curvature.fisher import Exact, Expectation
from imstep.curvature.hessian import gauss_newton_of, hessian_of
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised


class CurvatureChoice(ABC):
    """Chooses the curvature matrix at a point; all candidates are read off the same record."""

    @property
    def needs_record(self) -> bool:
        """Whether it looks at the record to choose; if not, a step without products need not make one."""
        return True

    @property
    def needs_graph(self) -> bool:
        """Whether it differentiates the loss further, so that autograd's graph must survive the evaluation."""
        return False

    @abstractmethod
    def candidates(
        self, point: Linearised, parameters: ParameterVector, progress: float, probe: bool, step: int
    ) -> list[SymmetricOperator]:
        """The matrices for the step at ``point``, in order: a later one serves if an earlier one proves indefinite.

        Args:
            point: the record.
            parameters: the vector it is about.
            progress: relative decrease of the loss in the last step; infinite before the first.
            probe: whether it is time to see if the Hessian has become definite.
            step: number of the step, for random numbers that differ from step to step.
        """


@dataclass(frozen=True)
class ExactHessian(CurvatureChoice):
    """The Hessian itself, of any loss: negative curvature is seen, and convergence is superlinear."""

    @property
    def needs_record(self) -> bool:
        return False

    def candidates(
        self, point: Linearised, parameters: ParameterVector, progress: float, probe: bool, step: int
    ) -> list[SymmetricOperator]:
        return [hessian_of(point, parameters)]


@dataclass(frozen=True)
class GaussNewtonFirst(CurvatureChoice):
    """The Gauss-Newton matrix where the loss is a convex function of outputs; close to a minimum the Hessian.

    Gauss-Newton is positive semidefinite and a third cheaper per product, but where residuals stay large it
    converges linearly only. So once steps bring little the Hessian is tried, and kept while it shows no
    negative curvature. Where the loss has another form it is the Hessian always.

    Args:
        close: relative decrease of the loss per step below which the Hessian is tried, in [0, 1]; 0 for never.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738, for the matrix; the switch is our choice.
    """

    close: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.close <= 1:
            raise ValueError(f"close, a relative decrease, must lie in [0, 1], got {self.close}.")

    def candidates(
        self, point: Linearised, parameters: ParameterVector, progress: float, probe: bool, step: int
    ) -> list[SymmetricOperator]:
        approximation = gauss_newton_of(point, parameters)
        exact = hessian_of(point, parameters)
        if approximation is None:
            return [exact]
        return [exact, approximation] if probe and progress < self.close else [approximation]


@dataclass(frozen=True)
class FisherCurvature(CurvatureChoice):
    """The Fisher matrix of the likelihood that the loss is: the curvature of a natural gradient step.

        F = Σ_i c_i E[gᵢ gᵢᵀ],   gᵢ = -∇ log p(yᵢ | zᵢ(w)),   for a loss Σ_i c_i (-log p(yᵢ | zᵢ))

    The distribution is read off the loss: squared errors are Gaussian, cross entropies categorical or Bernoulli,
    exp z - y z is Poisson. A case is an entry of the outputs' first dimension, for cross entropies each row of class
    scores. Squares of parameters, and weight decay, add their Hessian.

    Args:
        expectation: over which targets: :class:`~imstep.curvature.Exact`, the default,
            :class:`~imstep.curvature.MonteCarlo`, drawn anew in each step, or :class:`~imstep.curvature.Empirical`.

    Raises:
        TypeError: it is no expectation.
        ValueError: (in a step) the loss is not recognised as a likelihood.

    Cost: 4/3 of a gradient a product. Of a batch in pieces, all but :class:`~imstep.curvature.Exact` evaluate each
        piece anew for every product.

    Source: Amari, Neural Computation 10 (1998), 251-276; Martens, JMLR 21 (2020), number 146, for the three.
    """

    expectation: Expectation = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if not isinstance(self.expectation, Expectation):
            raise TypeError(
                f"expectation must be an Expectation, got {self.expectation!r}. Pass Exact(), MonteCarlo() or "
                "Empirical() from imstep.curvature."
            )

    @property
    def needs_graph(self) -> bool:
        return self.expectation.needs_graph

    def candidates(
        self, point: Linearised, parameters: ParameterVector, progress: float, probe: bool, step: int
    ) -> list[SymmetricOperator]:
        return [self.expectation.at(point, parameters, step)]
