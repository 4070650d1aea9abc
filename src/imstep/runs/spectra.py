"""What is asked of a problem's curvature at given weights, and the answers as a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from imstep import spectral
from imstep.linalg import LinearOperator
from imstep.runs.matrices import MATRICES, curvature, undisturbed
from imstep.runs.rows import TrainingError
from imstep.tasks import Problem
from imstep.tasks.base import check_seed
from imstep.tasks.blame import in_parts_of

__all__ = ["Point", "Questions", "measure"]

Tell = Callable[[str], None]
"""Is told how far a question is, in words."""


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Args:
        of: "hessian", "gauss-newton" or "fisher".
        by: "layer" or "parameter" for trace and largest eigenvalue of each block, too; None for the whole only.
        k: eigenvalues of largest magnitude, >= 1; all of a matrix that is smaller.
        tol: of their residuals, relative to the largest.
        steps, probes: of the density.
        rtol: of the trace, with probability 95 %.
        seed: of all random vectors.

    Raises:
        TrainingError: a setting out of range.
    """

    of: str = "hessian"
    by: str | None = None
    k: int = 10
    tol: float = 1e-4
    steps: int = 80
    probes: int = 8
    rtol: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.of not in MATRICES:
            raise TrainingError(f"--of {self.of}: there are {', '.join(MATRICES)}.")
        if self.by not in (None, "layer", "parameter"):
            raise TrainingError(f"--by {self.by}: give layer or parameter.")
        check_seed(self.seed)
        for option, least in (("-k", 1), ("--steps", 1), ("--probes", 2)):
            number = getattr(self, option.lstrip("-"))
            if number < least:
                raise TrainingError(f"{option} {number}: give a whole number of at least {least}.")
        for name in ("tol", "rtol"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(f"--{name} {getattr(self, name)}: give a number between 0 and 1.")


@dataclass(frozen=True)
class Point:
    """The answers at one set of weights.

    Args:
        step: of the run; None where the weights belong to no run.
        loss: mean training loss there, in evaluation mode.
        answers: by question: "eigenvalues" (values, residual_norms, largest, converged), "density" (grid, values,
            error, width), "trace" (value, error, converged), "layers" (by: name -> parameters, trace, error, largest);
            each with products and seconds. Those that are missing were not reached.
    """

    step: int | None
    loss: float
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, but for numbers that are not finite."""
        return asdict(self)


def measure(
    problem: Problem,
    questions: Questions,
    step: int | None = None,
    earlier: Point | None = None,
    keep: Callable[[Point], None] = lambda point: None,
    tell: Tell = lambda words: None,
) -> Point:
    """All answers at the present weights; the model, its buffers and all random numbers are left as they were.

    Args:
        problem: model and data; the matrix is that of the mean loss over the training set.
        questions: what is asked.
        step: to be noted.
        earlier: answers that need not be found again.
        keep: called with what there is after each answer.
        tell: told how far it is.

    Raises:
        TrainingError: there is no such matrix of the loss.
    """
    with undisturbed(problem):
        tell("building the matrix")
        with in_parts_of(problem.task):
            point = earlier or Point(step, float(problem.closure(problem.train)().detach()))
        wanted = {name: ask for name, ask in _QUESTIONS.items() if name != "layers" or questions.by is not None}
        missing = {name: ask for name, ask in wanted.items() if name not in point.answers}
        matrix = curvature(problem, questions.of) if missing else None
        for name, ask in missing.items():
            assert matrix is not None
            start = time.perf_counter()
            answer = ask(matrix, questions, partial(_tell, tell, name))
            answer["seconds"] = time.perf_counter() - start
            point = Point(point.step, point.loss, {**point.answers, name: answer})
            keep(point)
    return point


def _tell(tell: Tell, name: str, words: str) -> None:
    tell(f"{name}: {words}")


def _eigenvalues(matrix: LinearOperator, asked: Questions, tell: Tell) -> dict[str, Any]:
    k = min(asked.k, matrix.size)
    found = spectral.eigenpairs(
        matrix, k, "LM", asked.tol, seed=asked.seed,
        progress=lambda now: tell(f"{now.products} products, {now.converged} of {k} found"),
    )  # fmt: skip
    values, products = found.values.tolist(), found.products
    # A positive one of largest magnitude is the largest; where there is none it lies elsewhere.
    largest = max(values)
    if largest <= 0:
        top = spectral.eigenpairs(matrix, 1, "LA", asked.tol, seed=asked.seed)
        largest, products = float(top.values[0]), products + top.products
    return {
        "values": values,
        "residual_norms": found.residual_norms.tolist(),
        "largest": largest,
        "converged": found.converged,
        "products": products,
    }


def _density(matrix: LinearOperator, asked: Questions, tell: Tell) -> dict[str, Any]:
    tell(f"{asked.probes} probes of {asked.steps} steps")
    found = spectral.density(matrix, asked.steps, asked.probes, points=512, seed=asked.seed)
    lists = {name: getattr(found, name).tolist() for name in ("grid", "values", "error")}
    return {**lists, "width": found.width, "products": found.products}


def _trace(matrix: LinearOperator, asked: Questions, tell: Tell) -> dict[str, Any]:
    tell(f"to {asked.rtol:g}")
    return asdict(spectral.trace(matrix, asked.rtol, seed=asked.seed))


def _layers(matrix: LinearOperator, asked: Questions, tell: Tell) -> dict[str, Any]:
    assert asked.by is not None
    layers, products = {}, 0
    for name, block in matrix.diagonal_blocks(asked.by).items():
        tell(name)
        trace = spectral.trace(block, asked.rtol, seed=asked.seed)
        top = spectral.eigenpairs(block, 1, "LA", max(asked.tol, 1e-3), seed=asked.seed)
        products += trace.products + top.products
        largest = float(top.values[0]) if len(top.values) else math.nan
        layers[name] = {"parameters": block.size, "trace": trace.value, "error": trace.error, "largest": largest}
    return {"by": layers, "products": products}


_QUESTIONS: dict[str, Callable[[LinearOperator, Questions, Tell], dict[str, Any]]] = {
    "eigenvalues": _eigenvalues,
    "density": _density,
    "trace": _trace,
    "layers": _layers,
}
