"""The Fisher information matrix of a model's parameters as a linear operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from imstep.complexstep.gauss_newton import gauss_newton
from imstep.curvature.batches import ROOM_FOR_RECORDS, BatchOperator, ProgressCallback, Series, over
from imstep.curvature.cases import Rows, case_matrix, drawn_rows, observed_rows
from imstep.curvature.families import family
from imstep.curvature.gauss_newton import BatchGaussNewton, LossOfOutputs
from imstep.curvature.likelihoods import Likelihood
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import PointOperator, SymmetricOperator, TapeOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.reduction import Reduction
from imstep.curvature.sharded import parameters_of
from imstep.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pair = Callable[[], tuple[Tensor, Tensor]]


@uncompiled
class Fisher(PointOperator):
    """The Fisher matrix of a model's distribution of targets, at the parameters' values when it was built.

        F = 1/N Σ_i E[gᵢ gᵢᵀ],   gᵢ = -∇ log p(yᵢ | zᵢ(w)),   a mean over the N cases of the batch

    Args:
        closure: returns ``(outputs, targets)``.
        params: as for :class:`Hessian`.
        likelihood: the distribution p, such as ``Categorical()``.
        expectation: over which targets: :class:`Exact`, :class:`MonteCarlo` or :class:`Empirical`.
        memory_budget: as for :class:`Hessian`.

    Attributes: see :class:`PointOperator`; ``loss`` is the mean of -log p over the cases, up to terms without w, and
        ``gradient`` its gradient. The matrix is positive semidefinite.

    Raises: as for :class:`GaussNewton`; also
        TypeError: the likelihood or the expectation is none, or a class in place of an instance.
        ValueError: targets do not fit the outputs.

    Cost: as :class:`GaussNewton`; no gradient of a single case is ever stored.

    Source: Martens, Journal of Machine Learning Research 21 (2020), number 146: the matrix, where it equals that of
        Gauss-Newton, and the empirical one.

    Example:
        >>> from imstep.curvature import Empirical, Gaussian
        >>> w = nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([3.0, 0.0])
        >>> F = Fisher(lambda: (x @ w, y), [w], Gaussian())
        >>> F.to_dense()                    # XᵀX / 2
        tensor([[0.5000, 1.0000],
                [1.0000, 2.5000]])
        >>> Fisher(lambda: (x @ w, y), [w], Gaussian(), Empirical()).to_dense()
        tensor([[2., 4.],
                [4., 8.]])
    """

    def __init__(
        self,
        closure: Pair,
        params: nn.Module | Iterable[Tensor],
        likelihood: Likelihood,
        expectation: Expectation | None = None,
        memory_budget: int | None = None,
    ) -> None:
        parameters = ParameterVector(params)
        model = _checked(likelihood, expectation).of(likelihood, closure)
        super().__init__(parameters, BatchGaussNewton(model, parameters).once(memory_budget))

    @classmethod
    def over(
        cls,
        batches: Iterable[Any],
        closure: Callable[[Any], tuple[Tensor, Tensor]],
        params: nn.Module | Iterable[Tensor],
        likelihood: Likelihood,
        expectation: Expectation | None = None,
        *,
        reduction: Reduction | None = None,
        memory_budget: int | None = ROOM_FOR_RECORDS,
        progress: ProgressCallback | None = None,
        process_group: ProcessGroup | None = None,
    ) -> BatchOperator:
        """The Fisher matrix over all ``batches``; see :meth:`Hessian.over`.

        Args:
            closure: called with a batch, returns ``(outputs, targets)``.
            likelihood, expectation: as for :class:`Fisher`.
        """
        of = _checked(likelihood, expectation).of
        kind = lambda f, vector, number: BatchGaussNewton(of(likelihood, f, number), vector)
        parameters = parameters_of(params, process_group)
        return over(Series(batches, closure, parameters, kind), reduction, memory_budget, progress)


class Expectation(ABC):
    """Over which targets the products of gradients are averaged in a Fisher matrix."""

    @abstractmethod
    def of(self, likelihood: Likelihood, closure: Pair, batch: int = 0) -> LossOfOutputs:
        """The mean loss, in two parts such that its Gauss-Newton matrix is the Fisher matrix.

        Args:
            likelihood: the distribution.
            closure: returns ``(outputs, targets)``.
            batch: number of the batch.
        """

    @property
    def needs_graph(self) -> bool:
        """Whether :meth:`at` needs autograd's graph of the loss."""
        return True

    @abstractmethod
    def at(self, point: Linearised, parameters: ParameterVector, step: int) -> SymmetricOperator:
        """The Fisher matrix at a point that was evaluated already, of the likelihood that its loss is.

        Args:
            point: of a closure that returns the loss alone.
            parameters: the vector it is about.
            step: sets the random numbers, with the seed.

        Raises:
            ValueError: the loss is not recognised as a likelihood.
        """


@dataclass(frozen=True)
class Exact(Expectation):
    """Over all targets, each with its probability under the model: Jᵀ L'' J with L the mean of -log p."""

    def of(self, likelihood: Likelihood, closure: Pair, batch: int = 0) -> LossOfOutputs:
        return LossOfOutputs(closure, lambda z, y: _of_cases(likelihood, z, y, y).mean(), convex=True)

    @property
    def needs_graph(self) -> bool:
        return False

    def at(self, point: Linearised, parameters: ParameterVector, step: int) -> SymmetricOperator:
        def build(at: Linearisation) -> TapeOperator:
            split = _likelihood(at, natural=True).split
            assert split is not None
            tape = gauss_newton(at.tape, split.nodes)
            return TapeOperator(parameters.evaluated, tape, definite=True, penalty=at.penalty)

        return _recognised(point).matrix(parameters, build, definite=True)


@dataclass(frozen=True)
class MonteCarlo(Expectation):
    """Over targets drawn from the model's distribution, once, when the operator is built: unbiased.

    Args:
        samples: targets drawn for each case, >= 1.
        seed: of the generator they come from, >= 0; each batch has numbers of its own.

    Raises:
        ValueError: there are no samples, or the seed is negative.

    Cost: the losses of ``samples`` targets a case; the model is evaluated once.
    """

    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is at least 1, got {self.samples}.")
        if self.seed < 0:
            raise ValueError(f"seed is at least 0, got {self.seed}.")

    def of(self, likelihood: Likelihood, closure: Pair, batch: int = 0) -> LossOfOutputs:
        def losses() -> tuple[Tensor, Tensor]:
            outputs, targets = _pair(closure())
            at = outputs.detach()
            generator = torch.Generator(at.device).manual_seed(self._seed(batch))
            samples = [likelihood.sample(at, generator) for _ in range(self.samples)]
            drawn = [_of_cases(likelihood, outputs, sample, targets) for sample in samples]
            return _of_cases(likelihood, outputs, targets, targets), torch.stack(drawn)

        return LossOfOutputs(losses, lambda observed, drawn: observed.mean() + _outer_products(drawn), convex=True)

    def at(self, point: Linearised, parameters: ParameterVector, step: int) -> SymmetricOperator:
        rank = 0 if parameters.processes is None else parameters.processes.rank

        def rows(at: Linearisation) -> list[Rows]:
            generator = torch.Generator(parameters.device).manual_seed(self._seed(step, rank, at.piece))
            return drawn_rows(_likelihood(at), self.samples, generator)

        return case_matrix(_recognised(point), parameters, rows)

    def _seed(self, *numbers: int) -> int:
        return int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Empirical(Expectation):
    """Over the targets that were observed. Not the Fisher matrix of the model, only close to it where the model fits.

    Source: Kunstner, Balles and Hennig, NeurIPS 2019 (arXiv 1905.12558), on where it is not.
    """

    def of(self, likelihood: Likelihood, closure: Pair, batch: int = 0) -> LossOfOutputs:
        def observed() -> tuple[Tensor]:
            outputs, targets = _pair(closure())
            return (_of_cases(likelihood, outputs, targets, targets),)

        return LossOfOutputs(observed, lambda losses: losses.mean() + _outer_products(losses), convex=True)

    def at(self, point: Linearised, parameters: ParameterVector, step: int) -> SymmetricOperator:
        return case_matrix(_recognised(point), parameters, lambda at: observed_rows(_likelihood(at)))


def _recognised(point: Linearised) -> Linearised:
    """The point, if its loss has an end that may be a likelihood."""
    if not point.convex:
        raise ValueError(
            "a Fisher matrix is that of a likelihood, and this loss is not recognised as one: it is no sum of squared "
            "errors, cross entropies, exponentials and the like. Build it from those of the model's outputs by sums, "
            "means and positive factors (weight decay as squares of parameters, not of norms), logarithms of "
            "probabilities by cross_entropy, log_softmax, binary_cross_entropy_with_logits, logsigmoid or softplus of "
            "outputs, with clamp(min=eps) of a probability p in place of p + eps; or take GaussNewtonFirst() or "
            "ExactHessian() as the curvature."
        )
    return point


def _likelihood(at: Linearisation, natural: bool = False) -> Linearisation:
    """The evaluation, if each end of its loss is a likelihood, if asked for in natural parameters."""
    assert at.split is not None
    for end in at.split.losses:
        kind, name = family(end), end.func.overloadpacket.__name__
        if kind is None:
            raise ValueError(
                f"{name} is not -log p of a distribution that has a Fisher matrix here. Use a squared error, or take "
                "GaussNewtonFirst() as the curvature, which is defined for any convex loss."
            )
        if natural and not kind.natural:
            raise ValueError(
                f"{name} takes probabilities, in which the Hessian of the loss is not the Fisher matrix. Leave the "
                "sigmoid out of the model and use binary_cross_entropy_with_logits; or use MonteCarlo()."
            )
    return at


def _checked(likelihood: Likelihood, expectation: Expectation | None) -> Expectation:
    """The expectation; raises where it or the likelihood is none."""
    for given, kind, example in ((likelihood, Likelihood, "Categorical()"), (expectation, Expectation, "Empirical()")):
        if given is not None and not isinstance(given, kind):
            got = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise TypeError(f"this is no {kind.__name__}: a Fisher matrix takes one such as {example}, got {got}.")
    return expectation or Exact()


def _pair(returned: Any) -> tuple[Tensor, Tensor]:
    """What a closure returned, if it is outputs and targets."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TypeError(
            f"closure returned {type(returned).__name__}; a Fisher matrix needs the model's outputs and the targets "
            "apart. Return (outputs, targets)."
        )
    return returned[0], returned[1]


def _of_cases(likelihood: Likelihood, outputs: Tensor, targets: Tensor, observed: Tensor) -> Tensor:
    """-log p of ``targets``, of the cases that count by those that were observed."""
    losses, counted = likelihood.losses(outputs, targets), likelihood.counted(observed)
    return losses if counted is None else losses[counted]


def _outer_products(losses: Tensor) -> Tensor:
    """Zero, with zero gradient; its Hessian in the losses makes the mean of g gᵀ the Gauss-Newton matrix."""
    return ((losses - losses.detach()) ** 2).mean() / 2
