"""From the derivative of the gradient to its Gauss-Newton part.

For a loss L(z(w)) the Hessian is Jᵀ L'' J + Σ_i L'_i z_i''. The second term enters a recorded gradient in one place:
where the backward pass of z multiplies by values that depend on w. Read these as constants and the same tape computes
Jᵀ L'' J. What remains exact is the loss itself, with everything it does to z, and terms that
bypass z, such as weight decay.

Source: our own choice; for the matrix itself see Schraudolph, Neural Computation 14 (2002), 1723-1738, section 3.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from imstep.complexstep.steps import Step, slot_of
from imstep.complexstep.tape import Tape


def gauss_newton(tape: Tape, nodes: Container[int]) -> Tape:
    """The tape with the second derivatives of the outputs left out; ``nodes`` of autograd's graph are of the loss."""
    through = [at for at, step in enumerate(tape.steps) if _through_outputs(step, nodes)]
    return tape.with_inputs(through, lambda: _without_second_derivatives(tape, through))


def _without_second_derivatives(tape: Tape, through: Sequence[int]) -> list[list[Any]]:
    """The inputs of some steps, with constants for the values that depend on the parameters."""
    forward = set(tape.inputs)
    for step in tape.steps:
        if not step.backward:
            forward.update(step.writes())
    constant = lambda ref: None if ref is None or slot_of(ref) in forward else ref
    return [_map(constant, tape.steps[at].inputs) for at in through]


def _through_outputs(step: Step, nodes: Container[int]) -> bool:
    """Whether a step is of the backward pass of z; also where that recomputes z, as checkpoints do."""
    return step.backward and step.node not in nodes


def _map(function: Any, refs: Any) -> Any:
    return [_map(function, ref) if isinstance(ref, list) else function(ref) for ref in refs]
