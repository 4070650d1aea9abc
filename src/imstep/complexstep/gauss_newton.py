"""From the derivative of the gradient to its Gauss-Newton part.

For a loss L(z(w)) the Hessian is Jᵀ L'' J + Σ_i L'_i z_i''. The second term enters a recorded gradient in one place:
where the backward pass of z multiplies by values that depend on w. Read these as constants and the same tape computes
Jᵀ L'' J. What remains exact is the loss itself, with everything it does to z, and terms that
bypass z, such as weight decay.

The split into z and loss is read off the tape: walk back from the loss through linear operators with
positive factors; the arguments of the first convex operators on the way are the outputs z. Our own choice; for the
matrix itself see Schraudolph, Neural Computation 14 (2002), 1723-1738, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.tape import Reference, Step, Tape

aten = torch.ops.aten

_SUMS = {aten.sum, aten.mean, aten.add, aten.clone, aten._to_copy, aten.stack, aten.cat, aten.index, aten.select_backward}
_SCALINGS = {aten.mul, aten.div}
_CONVEX = {
    aten.mse_loss,
    aten.huber_loss,
    aten.smooth_l1_loss,
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
    aten.softplus,
}


@dataclass(frozen=True, eq=False)
class ConvexLoss:
    """A convex operator at the end of a model: what it was called with.

    Attributes:
        func: the operator.
        args: its arguments, real parts; the first is the output z.
        result: its value.
        outputs: the slots of z (and of further arguments that depend on the parameters).
    """

    func: Any
    args: tuple[Any, ...]
    result: Tensor
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LossSplit:
    """A loss as a positive combination of convex operators of outputs z.

    Attributes:
        losses: the convex operators.
        nodes: the nodes of autograd's graph that belong to the loss and not to z.
    """

    losses: list[ConvexLoss]
    nodes: frozenset[int]


def split_loss(tape: Tape, loss: Reference | None) -> LossSplit | None:
    """Split what a tape in the making has recorded; None where the loss has no convex end."""
    losses = _convex_ends(tape, loss)
    if not losses:
        return None
    inner = _ancestors(tape.steps, {slot for end in losses for slot in end.outputs})
    of_loss: dict[int, bool] = {}
    for step, is_inner in zip(tape.steps, inner, strict=True):
        if not step.call.backward:
            of_loss.setdefault(step.call.node, not is_inner)
    return LossSplit(losses, frozenset(node for node, outer in of_loss.items() if outer))


def _convex_ends(tape: Tape, loss: Reference | None) -> list[ConvexLoss]:
    """The convex operators whose positive combination is the loss; empty if the loss has another form."""
    producers = {slot: step for step in tape.steps for slot in step.writes}
    found: dict[int, ConvexLoss] = {}
    pending = [] if loss is None else [loss[0]]
    while pending:
        step = producers.get(pending.pop())
        if step is None or step.call.backward:
            return []
        packet = step.call.func.overloadpacket
        convex = _convex(step, producers)
        if convex is not None:
            found[id(step)] = convex
        elif packet in _SUMS or (packet in _SCALINGS and _positive_factor(step.call.args)):
            pending.extend(step.reads)
        else:
            return []
    return list(found.values())


def gauss_newton(tape: Tape, split: LossSplit) -> Tape:
    """The tape with the second derivatives of the outputs left out."""
    forward = set(tape.inputs)
    for step in tape.steps:
        if not step.call.backward:
            forward.update(step.writes)
    constant = lambda ref: None if ref is None or ref[0] in forward else ref
    steps = [
        replace(step, inputs=_map(constant, step.inputs)) if _through_outputs(step, split) else step
        for step in tape.steps
    ]
    return tape.with_steps(steps)


def _through_outputs(step: Step, split: LossSplit) -> bool:
    """Whether a step is of the backward pass of z; also where that recomputes z, as checkpoints do."""
    return step.call.backward and step.call.node not in split.nodes


def _convex(step: Step, producers: dict[int, Step]) -> ConvexLoss | None:
    func, args = step.call.func, step.call.args
    packet = func.overloadpacket
    slots = step.reads
    square = (packet is aten.pow and len(args) > 1 and args[1] == 2) or (
        packet is aten.mul and len(slots) == 2 and slots[0] == slots[1] and args[0] is args[1]
    )
    if packet in _CONVEX or square:
        return ConvexLoss(func, args, step.call.result, tuple(slots))
    if packet is aten.nll_loss_forward or packet is aten.nll_loss2d_forward:
        softmax = producers.get(slots[0])
        if softmax is not None and softmax.call.func is aten._log_softmax.default:
            return ConvexLoss(softmax.call.func, softmax.call.args, softmax.call.result, tuple(softmax.reads))
    return None


def _positive_factor(args: tuple[Any, ...]) -> bool:
    factors = [a for a in args[:2] if not (isinstance(a, Tensor) and a.requires_grad)]
    return len(factors) == 1 and all(bool((torch.as_tensor(a) >= 0).all()) for a in factors)


def _ancestors(steps: list[Step], needed: set[int]) -> list[bool]:
    """Which steps the slots ``needed`` are computed from, backward passes excepted."""
    needed = set(needed)
    found = []
    for step in reversed(steps):
        inner = not step.call.backward and any(slot in needed for slot in step.writes)
        if inner:
            needed.update(step.reads)
        found.append(inner)
    return found[::-1]


def _map(function: Any, refs: Any) -> Any:
    return [_map(function, ref) if isinstance(ref, list) else function(ref) for ref in refs]
