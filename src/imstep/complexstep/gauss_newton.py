"""From the derivative of the gradient to its Gauss-Newton part.

For a loss L(z(w)) the Hessian is Jᵀ L'' J + Σ_i L'_i z_i''. The second term enters a recorded gradient in one place:
where the backward pass of z multiplies by values that depend on w. Read these as constants and the same tape computes
Jᵀ L'' J. What remains exact is the loss itself, with everything it does to z, and terms that
bypass z, such as weight decay.

The split into z and loss is read off the tape: walk back from the loss through linear operators, keeping account of
signs; the arguments of the first convex operators on the way are the outputs z. Terms that are linear in z, as in a
Poisson likelihood, may have any sign. Our own choice; for the
matrix itself see Schraudolph, Neural Computation 14 (2002), 1723-1738, section 3.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import plain
from imstep.complexstep.registry import signature
from imstep.complexstep.steps import Reference, Step, flat, slot_of
from imstep.complexstep.tape import Tape

aten = torch.ops.aten

_SUMS = {aten.sum, aten.mean, aten.add, aten.clone, aten._to_copy, aten.stack, aten.cat, aten.index}
_SUMS |= {aten.select_backward, aten.masked_fill, aten.where, aten.gather, aten.index_select, aten.masked_select}
_SUMS |= {aten.topk, aten.sort, aten.flip, aten.roll, aten.repeat, aten.cumsum, aten.constant_pad_nd}
_SUMS |= {aten.scatter_add, aten.index_add}
_PRODUCTS = {aten.mul, aten.dot, aten.mv}  # whose factor is the other argument
_ROOTS = {aten.linalg_vector_norm, aten.norm, aten.dist, aten.sqrt, aten.hypot}
_NLL = {aten.nll_loss_forward, aten.nll_loss2d_forward}
_JOINTLY_CONVEX = {aten.mse_loss, aten.huber_loss, aten.smooth_l1_loss}  # in both arguments
_CONVEX = {
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
    aten.softplus,
}  # in the first; cross entropies are linear in the second


@dataclass(frozen=True, eq=False)
class ConvexLoss:
    """A convex operator at the end of a model: what it was called with.

    Attributes:
        func: the operator.
        args: its arguments, real parts.
        result: its value.
        references: how the arguments that depend on the parameters look onto the tape's slots.
        positions: which arguments these are. Others may require gradients, too, as targets that a model makes do which
            another optimizer trains.
    """

    func: Any
    args: tuple[Any, ...]
    result: Tensor
    references: tuple[Reference, ...]
    positions: tuple[int, ...]

    @property
    def position(self) -> int:
        """Which argument is the output z: the first that depends on the parameters."""
        return self.positions[0]

    @property
    def z(self) -> Tensor:
        """The output z."""
        return self.args[self.position]

    @property
    def sides(self) -> list[tuple[Reference, Tensor, int]]:
        """What the loss takes of the parameters, with signs: both sides of an error may depend on them."""
        if self.func.overloadpacket not in _JOINTLY_CONVEX:
            return [(self.references[0], self.z, 1)]
        signs = [1, -1]
        return [(ref, self.args[at], signs[at]) for ref, at in zip(self.references, self.positions, strict=True)]

    @property
    def outputs(self) -> list[int]:
        """The slots of the arguments that depend on the parameters."""
        return [slot_of(ref) for ref in self.references]

    def value(self, *arguments: Tensor) -> Tensor:
        """The operator with other values for the arguments that depend on the parameters."""
        at = dict(zip(self.positions, arguments, strict=True))
        return self.func(*(at.get(i, plain(a) if isinstance(a, Tensor) else a) for i, a in enumerate(self.args)))


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
        if not step.backward:
            # Hooks on what autograd saves may copy it, in the name of the node that saves it.
            of_loss[step.node] = of_loss.get(step.node, True) and not is_inner
    return LossSplit(losses, frozenset(node for node, outer in of_loss.items() if outer))


def _convex_ends(tape: Tape, loss: Reference | None) -> list[ConvexLoss]:
    """The convex operators whose positive combination is the loss; empty if the loss has another form."""
    found: list[ConvexLoss] = []
    outputs: set[int] = set()
    squared: set[int] = set()  # outputs that are squared, and what they are multiples of
    wanted = {} if loss is None else {slot_of(loss): 1}  # slots that the loss is made of, with their signs; 0 for both
    for step in reversed(tape.steps):
        if step.backward and step.target is None:
            continue  # the loss is older
        signs = {wanted.pop(slot) for slot in step.writes() if slot in wanted and slot not in outputs}
        if not signs:
            if not squared.isdisjoint(step.writes()):
                if _is_root(step):
                    return []  # the square of a norm is many residuals, of which this split would see one
                multiple = step.func.overloadpacket is aten.neg or _factor(step) is not None
                squared.update(step.reads() if multiple else ())
            continue
        sign = signs.pop() if len(signs) == 1 else 0
        end = _convex(step, sign)
        if end is not None:
            found.append(end)
            outputs.update(end.outputs)
            squared.update(end.outputs if end.func.overloadpacket in (aten.pow, aten.mul) else ())
            continue
        parts = None if step.backward else _linear(step, sign)
        if parts is None:
            return []
        for slot, part in parts:
            wanted[slot] = part if wanted.get(slot, part) == part else 0
    # With its z left out again it is a cross entropy; alone it may be of losses, whose own curvature would be lost.
    alone = any(wanted.get(end.outputs[0]) != -1 for end in found if end.func.overloadpacket is aten.logsumexp)
    return found if outputs.issuperset(wanted) and not alone else []


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


def _convex(step: Step, sign: int) -> ConvexLoss | None:
    """The operator as a convex end, if it is one with this sign."""
    func, args, result = step.func, step.args, step.result
    packet, slots = func.overloadpacket, step.reads()
    if step.backward or result is None or result.is_complex():
        return None
    square = (packet is aten.pow and len(args) > 1 and args[1] == 2) or (
        packet is aten.mul and len(slots) == 2 and slots[0] == slots[1] and args[0] is args[1]
    )
    # An exponential of one number is no likelihood of many cases: its Hessian says more than a matrix of rank one.
    several = packet is aten.exp and result.numel() > 1
    places = _places(step)
    convex = square or several or packet in _JOINTLY_CONVEX or (packet in _CONVEX and places == (0,))
    convex = convex or (packet is aten.logsumexp and len(args[1]) == 1 and args[0].ndim > 0)
    # What an operator without a rule is computed by, or one in place, has no place in autograd's graph.
    seen = result.requires_grad and all(_differentiated(args[at]) for at in places)
    if seen and ((convex and sign > 0) or (func is aten._log_softmax.default and sign < 0)):
        return ConvexLoss(func, args, result, tuple(flat(step.inputs)), places)
    return None


def _places(step: Step) -> tuple[int, ...]:
    """Which arguments of a step's operator depend on the parameters."""
    pairs = zip(signature(step.func).tensors, step.inputs, strict=False)
    return tuple(at for (at, *_), ref in pairs if ref is not None and at >= 0)


def _is_root(step: Step) -> bool:
    """Whether a step takes norms, or roots of what may be sums of squares."""
    packet = step.func.overloadpacket
    return packet in _ROOTS or (packet is aten.pow and len(step.args) > 1 and step.args[1] == 0.5)


def _linear(step: Step, sign: int) -> list[tuple[int, int]] | None:
    """The slots that a linear operator adds up, each with its sign; None for another operator."""
    packet, alpha = step.func.overloadpacket, step.alpha
    slots = step.reads()
    if alpha != 1 and packet not in (aten.add, aten.sub):
        return None
    if packet in _SUMS or packet is aten.sub:
        second = alpha if packet is not aten.sub else -alpha
        if second == 1:
            return [(slot, sign) for slot in slots]
        refs = [pair for pair in zip(step.inputs, (1, second), strict=False) if pair[0] is not None and pair[1] != 0]
        return [(slot_of(ref), sign if factor > 0 else -sign) for ref, factor in refs]
    if packet is aten.neg or packet is aten.rsub or packet in _NLL:
        return [(slots[0], -sign)] if len(slots) == 1 else None
    if packet is aten.copy_:
        return [(slot, sign) for slot in slots] if type(step.target) is int else None
    factor = _factor(step)
    if factor is None:
        return None
    if packet is aten.mul and not bool(factor.any()):
        return []  # 0 * p.sum(), so that each parameter has a gradient: no part of the loss
    part = 1 if bool((factor >= 0).all()) else -1 if bool((factor <= 0).all()) else 0
    return [(slot, sign * part) for slot in slots]


def _factor(step: Step) -> Tensor | None:
    """The constant factor of a product, or divisor of a quotient; None if there is none."""
    packet, places = step.func.overloadpacket, _places(step) if step.args else ()
    if len(places) != 1 or not (packet in _PRODUCTS or (packet is aten.div and places == (0,))):
        return None
    factor = plain(torch.as_tensor(step.args[1 - places[0]])).detach()
    return None if factor.is_complex() else factor


def _differentiated(a: Any) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


def _ancestors(steps: list[Step], needed: set[int]) -> list[bool]:
    """Which steps the slots ``needed`` are computed from, backward passes excepted."""
    needed = set(needed)
    found = []
    for step in reversed(steps):
        inner = not step.backward and any(slot in needed for slot in step.writes())
        if inner:
            needed.update(step.reads())
        found.append(inner)
    return found[::-1]


def _map(function: Any, refs: Any) -> Any:
    return [_map(function, ref) if isinstance(ref, list) else function(ref) for ref in refs]
