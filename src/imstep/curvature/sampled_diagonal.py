"""A diagonal of curvature from one backward pass with sampled targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.complexstep.later import later_grad
from imstep.curvature.kronecker_totals import places_of
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.sampling import Place, pulled, sample_output_gradients
from imstep.curvature.shared import SharedLinearisation


def sampled_diagonal(point: Linearised, parameters: ParameterVector, generator: torch.Generator) -> Tensor:
    """(Jᵀu)², (n,), whose expectation is the diagonal of the Gauss-Newton matrix at a convex point with its graph.

    Over processes u is what one process draws for the whole batch, if that is not too much; then all call this
    together, with the same generator.

    Cost: a backward pass.

    Source: Liu et al., arXiv 2305.14342, Algorithm 2, for cross-entropies: there it is B ĝ² with the gradient ĝ of the
        mean over B sampled labels.
    """
    processes = parameters.processes
    if processes is None:
        return _of_evaluations(point, parameters, generator, None)
    assert isinstance(point, SharedLinearisation)
    places = places_of(point, processes)
    drawing = processes.own_generator(generator) if places is None else generator

    def part() -> Tensor | None:
        return None if point.own is None else _of_evaluations(point, parameters, drawing, places)

    found = processes.sum(part, parameters.size, parameters)
    states = processes.gather(lambda: None if point.own is None else generator.get_state())
    generator.set_state(next(state for state in states if state is not None))
    return found if places is None else found.square()


def _of_evaluations(
    point: Linearised, parameters: ParameterVector, generator: torch.Generator, places: Sequence[Place] | None
) -> Tensor:
    """The sum of (Jᵀu)² over evaluations; by ``places`` of Jᵀu, to be squared when that of all processes is there."""
    total = parameters.get().zero_()
    for weight, at, _ in point.evaluations(None):
        assert at.split is not None
        ends = at.split.losses
        outputs, u = pulled(ends, sample_output_gradients(at.loss, ends, generator, places))
        gradients = later_grad(outputs, list(parameters.tensors), u, keep=at.keeps_graph)
        found = parameters.flatten(gradients)
        total += weight * found.square() if places is None else math.sqrt(weight) * found
    return total
