"""The split of a loss L(z(w)) into outputs z of a model and a convex function L of them.

It is read off the tape: walk back from the loss through linear operators, keeping account of
signs; the arguments of the first convex operators on the way are the outputs z. Terms that are linear in z, as in a
Poisson likelihood, may have any sign. Logarithms of probabilities are read together with what makes these. Our own
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    aten.soft_margin_loss,
}  # in the first; cross entropies are linear in the second
_CONCAVE = {aten._log_softmax, aten.log_sigmoid_forward}
_LOGARITHMS = {aten.log, aten.log1p, aten.xlogy}
_CLAMPS = {aten.clamp, aten.clamp_min, aten.clamp_max}
_ONE_OFF = {aten.add, aten.sub, aten.rsub, aten.neg}  # 1 + e, 1 - p and -p
_PICKS = {aten.index, aten.gather, aten.index_select, aten.masked_select, aten.clone, aten._to_copy, *_CLAMPS}


@dataclass(frozen=True, eq=False)
class ConvexLoss:
    """A convex operator at the end of a model: what it was called with.

    Attributes:
        func: the operator.
        args: its arguments, real parts.
        result: what the loss takes: its value, or for a slope a function of it.
        references: how the arguments that depend on the parameters look onto the tape's slots.
        positions: which arguments these are. Others may require gradients, too, as targets that a model makes do which
            another optimizer trains.
        slope: of the result in the value of the operator: p where a loss takes -log p of p = softmax(z), 0 where p is
            clamped.
    """

    func: Any
    args: tuple[Any, ...]
    result: Tensor
    references: tuple[Reference, ...]
    positions: tuple[int, ...]
    slope: Tensor | int = 1

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
        args = [at.get(i, plain(a) if isinstance(a, Tensor) else a) for i, a in enumerate(self.args)]
        return _first(self.func(*args))


@dataclass(frozen=True, eq=False)
class LossSplit:
    """A loss as a positive combination of convex operators of outputs z.

    Attributes:
        losses: the convex operators.
        nodes: the nodes of autograd's graph that belong to the loss and not to z.
        between: those of them that are between z and a logarithm.
    """

    losses: list[ConvexLoss]
    nodes: frozenset[int]
    between: frozenset[int]


def split_loss(tape: Tape, loss: Reference | None) -> LossSplit | None:
    """Split what a tape in the making has recorded; None where the loss has no convex end."""
    between: set[int] = set()
    losses = _convex_ends(tape, loss, between)
    if not losses:
        return None
    inner = _ancestors(tape.steps, {slot for end in losses for slot in end.outputs})
    of_loss: dict[int, bool] = {}
    for step, is_inner in zip(tape.steps, inner, strict=True):
        if is_inner and not between.isdisjoint(step.writes()):
            return None  # probabilities that are outputs of another loss
        if not step.backward:
            # Hooks on what autograd saves may copy it, in the name of the node that saves it.
            of_loss[step.node] = of_loss.get(step.node, True) and not is_inner
    probabilities = (step.node for step in tape.steps if not between.isdisjoint(step.writes()))
    return LossSplit(losses, frozenset(node for node, outer in of_loss.items() if outer), frozenset(probabilities))


def _convex_ends(tape: Tape, loss: Reference | None, between: set[int]) -> list[ConvexLoss]:
    """The convex operators whose positive combination is the loss; empty if the loss has another form.

    Slots between outputs and logarithms are added to ``between``.
    """
    made: dict[int, Step | None] = {}
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
        end, parts = _convex(step, sign), None if step.backward else _linear(step, sign)
        if end is None and step.func.overloadpacket in _LOGARITHMS and not step.backward:
            made = made or _makers(tape.steps)
            end, parts, slots = _of_logarithm(step, sign, made)
            between.update(slots)
        if end is not None:
            if all(end.result is not other.result for other in found):
                found.append(end)
            outputs.update(end.outputs)
            squared.update(end.outputs if end.func.overloadpacket in (aten.pow, aten.mul) else ())
            continue
        if parts is None:
            return []
        for slot, part in parts:
            wanted[slot] = part if wanted.get(slot, part) == part else 0
    # With its z left out again it is a cross entropy; alone it may be of losses, whose own curvature would be lost.
    alone = any(wanted.get(end.outputs[0]) != -1 for end in found if end.func.overloadpacket is aten.logsumexp)
    return found if outputs.issuperset(wanted) and not alone else []


def _convex(step: Step, sign: int) -> ConvexLoss | None:
    """The operator as a convex end, if it is one with this sign."""
    args, result = step.args, _first(step.result)
    packet, slots = step.func.overloadpacket, step.reads()
    if step.backward or result is None or result.is_complex():
        return None
    square = (packet is aten.pow and len(args) > 1 and args[1] == 2) or (
        packet is aten.mul and len(slots) == 2 and slots[0] == slots[1] and args[0] is args[1]
    )
    # An exponential of one number is no likelihood of many cases: its Hessian says more than a matrix of rank one.
    several = packet is aten.exp and result.numel() > 1
    convex = square or several or packet in _JOINTLY_CONVEX or (packet in _CONVEX and _places(step) == (0,))
    convex = convex or (packet is aten.logsumexp and len(args[1]) == 1 and args[0].ndim > 0)
    if (convex and sign > 0) or (packet in _CONCAVE and sign < 0):
        return _end(step.func, step, result)
    return None


def _end(func: Any, step: Step, result: Tensor, slope: Tensor | int = 1, more: Any = ()) -> ConvexLoss | None:
    """The operator ``func`` of a step's arguments, or of its first one and ``more``, where autograd sees it."""
    places = _places(step)
    # What an operator without a rule is computed by, or one in place, has no place in autograd's graph.
    if not (result.requires_grad and all(_differentiated(step.args[at]) for at in places)):
        return None
    args = step.args if func is step.func or func is aten._log_softmax.default else (*step.args[:1], *more)
    return ConvexLoss(func, args, result, tuple(flat(step.inputs)), places, slope)


def _of_logarithm(
    step: Step, sign: int, made: dict[int, Step | None]
) -> tuple[ConvexLoss | None, list[tuple[int, int]] | None, list[int]]:
    """A logarithm as a convex end of what its argument is made of, or as linear in that, and the slots in between.

    log(1 + exp z), -log sigmoid z, -log(1 - sigmoid z), -log of entries of softmax z, and log exp z, each times a
    constant y as ``xlogy`` has it; log Σ exp z. Clamps of the probabilities, or of what is made of them, may lie
    between.
    """
    place = int(step.func.overloadpacket is aten.xlogy)
    if _places(step) != (place,):
        return None, None, []
    y = plain(torch.as_tensor(step.args[0])).detach() if place else 1
    sign, is_log = sign * _sign(y), step.func.overloadpacket is not aten.log1p
    base, between, _ = _beneath(step, made, _PICKS, whole=False)
    if base is not None and base.func.overloadpacket is aten._softmax and is_log and sign < 0:
        return _end(aten._log_softmax.default, base, base.result, plain(base.result).detach()), None, between
    base, between, inside = _beneath(step, made)
    if base is not None and base.func.overloadpacket is aten.sum:
        whole = is_log and not place and len(between) == 1  # no clamp lies between
        return _of_sum(step, base, made, sign if whole else 0), None, [*between, *base.reads()]
    turned = 1
    if base is not None and base.func.overloadpacket in _ONE_OFF and base.alpha == 1:
        turned = sum(part for _, part in _linear(base, 1) or ())
        base, more, free = _beneath(base, made)
        between, inside = [*between, *more], inside & free
    if base is None or base.func.overloadpacket not in (aten.exp, aten.sigmoid):
        return None, None, []
    argument, value, one = plain(step.args[place]).detach(), plain(base.result).detach(), int(is_log)
    is_exp, slope = base.func.overloadpacket is aten.exp, y * inside.to(value.dtype)
    fits = lambda expected: bool(((argument == expected) | ~inside).all())
    if is_exp and turned > 0 and is_log and torch.equal(argument, value):
        return None, [(base.reads()[0], sign)], between
    if is_exp and sign > 0 and turned > 0 and fits(one + value):
        return _end(aten.softplus.default, base, step.result, slope), None, between
    if not is_exp and sign < 0 and turned > 0 and is_log and fits(value):
        return _end(aten.log_sigmoid_forward.default, base, step.result, slope), None, between
    if not is_exp and sign < 0 and turned < 0 and fits(one - value):
        return _end(aten.softplus.default, base, step.result, -slope), None, between
    return None, None, between


def _of_sum(step: Step, total: Step, made: dict[int, Step | None], sign: int) -> ConvexLoss | None:
    """The logarithm of a sum of exponentials along one dimension, which values tell, as a convex end."""
    base = _below(total, made)
    if sign <= 0 or base is None or base.func.overloadpacket is not aten.exp:
        return None
    exponentials, argument = (plain(t).detach() for t in (base.result, step.args[0]))
    kept = argument.ndim == exponentials.ndim
    sums = [exponentials.sum(dim, keepdim=kept) for dim in range(exponentials.ndim)]
    fits = [dim for dim, s in enumerate(sums) if s.shape == argument.shape and torch.allclose(s, argument)]
    return _end(aten.logsumexp.default, base, step.result, more=(fits, kept)) if len(fits) == 1 else None


def _beneath(
    step: Step, made: dict[int, Step | None], through: set[Any] = _CLAMPS, whole: bool = True
) -> tuple[Step | None, list[int], Tensor]:
    """The step that makes what a step looks at, past some operators; the slots on the way; where no clamp has cut."""
    base, slots, inside = _below(step, made, whole), step.reads(), torch.tensor(True)
    while base is not None and base.func.overloadpacket in through:
        if base.func.overloadpacket in _CLAMPS and whole:
            inside = inside.to(base.result.device) & (plain(base.result).detach() == plain(base.args[0]).detach())
        slots, base = [*slots, *base.reads()], _below(base, made, whole)
    return base, slots, inside


def _below(step: Step, made: dict[int, Step | None], whole: bool = True) -> Step | None:
    """The step that makes the one tensor that a step looks at, as a whole where asked for; None for others."""
    refs = flat(step.inputs)
    return None if len(refs) != 1 or (whole and type(refs[0]) is not int) else made.get(slot_of(refs[0]))


def _makers(steps: Sequence[Step]) -> dict[int, Step | None]:
    """By slot the step of the forward pass that makes it; None where others write into it."""
    made: dict[int, Step | None] = {}
    for step in steps:
        for slot in step.writes():
            made[slot] = None if slot in made or step.backward else step
    return made


def _first(result: Any) -> Any:
    """The value among what an operator returns."""
    return result[0] if isinstance(result, (tuple, list)) else result


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
    return [(slot, sign * _sign(factor)) for slot in slots]


def _sign(factor: Tensor | int) -> int:
    """1 or -1 where no entry has another sign, else 0."""
    factor = torch.as_tensor(factor)
    return 1 if bool((factor >= 0).all()) else -1 if bool((factor <= 0).all()) else 0


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
