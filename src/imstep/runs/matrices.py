"""Curvature matrices of a problem's training loss, measured without a trace of it being left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from imstep.curvature import (
    Bernoulli,
    Categorical,
    Fisher,
    FrozenClosure,
    Gaussian,
    GaussNewton,
    Hessian,
    Likelihood,
    ParameterVector,
    Poisson,
)
from imstep.curvature.batches import ROOM_FOR_RECORDS
from imstep.curvature.hessian import gauss_newton_of
from imstep.curvature.state import RandomState
from imstep.linalg import LinearOperator
from imstep.runs.rows import TrainingError
from imstep.tasks import ExampleProblem, Problem

__all__ = ["MATRICES", "curvature", "undisturbed"]

MATRICES = ("hessian", "gauss-newton", "fisher")


@contextmanager
def undisturbed(problem: Problem) -> Iterator[None]:
    """Within it the model is in evaluation mode and has gradients; mode, buffers and random numbers are put back."""
    random, buffers = RandomState(problem.device), [(b, b.clone()) for b in problem.model.buffers()]
    try:
        with problem.evaluating(), torch.enable_grad():
            yield
    finally:
        random.restore()
        with torch.no_grad():
            for buffer, before in buffers:
                # Not touched without need: a record that an optimizer keeps would count as out of date.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def curvature(problem: Problem, of: str) -> LinearOperator:
    """The matrix of the mean loss over the training set, at the model's weights; layers have their names.

    Args:
        of: one of `MATRICES`.

    Raises:
        TrainingError: there is no such matrix of this problem's loss; says which there are.
    """
    if of == "hessian":
        return Hessian(problem.closure(problem.train), problem.model, memory_budget=ROOM_FOR_RECORDS)
    if of == "gauss-newton":
        return _gauss_newton(problem)
    if of == "fisher":
        if not isinstance(problem, ExampleProblem):
            raise TrainingError(
                f"--of fisher: {problem.task} has no outputs that a distribution of targets belongs to. "
                "Take hessian or gauss-newton."
            )
        likelihood, train = _likelihood(problem), problem.train
        pair = lambda: (problem.model(train.inputs), train.targets)
        return Fisher(pair, problem.model, likelihood, memory_budget=ROOM_FOR_RECORDS)
    raise TrainingError(f"--of {of}: there are {', '.join(MATRICES)}.")


def _gauss_newton(problem: Problem) -> LinearOperator:
    if isinstance(problem, ExampleProblem):
        train = problem.train
        pair = lambda: (problem.model(train.inputs), train.targets)
        return GaussNewton(pair, problem.model, problem.loss, memory_budget=ROOM_FOR_RECORDS)
    vector = ParameterVector(problem.model)
    frozen = FrozenClosure(problem.closure(problem.train), vector)
    try:
        matrix = gauss_newton_of(frozen.linearise(), vector)
    finally:
        frozen.leave(accepted=False)
    if matrix is None:
        raise TrainingError(
            f"--of gauss-newton: the loss of {problem.task} is not recognised as a convex function of outputs. "
            "Take --of hessian."
        )
    return matrix


def _likelihood(problem: ExampleProblem) -> Likelihood:
    known: dict[type, Likelihood] = {
        nn.CrossEntropyLoss: Categorical(),
        nn.MSELoss: Gaussian(),
        nn.BCEWithLogitsLoss: Bernoulli(),
        nn.PoissonNLLLoss: Poisson(),
    }
    for kind, likelihood in known.items():
        if isinstance(problem.loss, kind):
            return likelihood
    raise TrainingError(
        f"--of fisher: the loss of {problem.task} belongs to no distribution that is known: "
        f"{', '.join(kind.__name__ for kind in known)} do. Take --of gauss-newton, which is the Fisher matrix up to a "
        "factor where the loss is a negative log-likelihood."
    )
