"""Whether the losses of batches are means over what the batches are weighed by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from imstep.complexstep.islands import plain, unseen
from imstep.curvature.reduction import Reduction, lengths
from imstep.curvature.sameness import operator
from imstep.curvature.square_forms import LINEAR

_MEAN, _SUM = 1, 2  # how autograd's graph notes the reduction of a loss
_OF_LABELS = ("NllLoss", "NllLoss2D")
_NUMBERS = ("Sum", "Mean", "LinalgVectorNorm", "Norm", "Dist", "Std", "Var", "Max", "Min", "Amax", "Amin")
"""Operators that make one number of many, at least for each column; those from the third on are not linear."""
_VIEWS = ("View", "ReshapeAlias", "Alias", "UnsafeView", "Squeeze", "ToCopy")
_TELL = "Pass reduction=MeanOverSamples(count=...), a function of a batch"


class Means:
    """Compares batches with the first one, where their weights are lengths of tensors, and nobody has told that.

    A mean over labels divides by their number without the ignored ones, or by their class weights, a mean over what a
    mask leaves by its number. Only what is in proportion to the weights of batches adds up to a mean over all. What is
    the same for both is taken for something else, as a mean over parameters. A sum is told where it is plain.

    Args:
        reduction: gives the weights.

    Example:
        >>> import torch
        >>> from imstep.curvature import MeanOverSamples
        >>> means = Means(MeanOverSamples())
        >>> means.weigh((torch.zeros(3, 2), torch.zeros(3))), means.weigh((torch.zeros(2, 2), torch.zeros(2)))
        (3.0, 2.0)
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction, self._guessed = reduction, reduction.guessed
        self._lengths: list[int] = []
        self._weights: list[float] = []
        self._first: list[float] = []  # what the means of the first batch are over
        self._number = self._met = 0  # the batch that was looked at last, and how many of its means

    def weigh(self, batch: Any) -> float:
        """The weight of the next batch.

        Raises:
            ValueError: it is the length of a tensor, and no other one's goes with it.
        """
        weight = self._reduction.weight(batch)
        if self._guessed:
            found = lengths(batch)
            self._lengths = self._lengths or found
            _check_lengths(self._lengths, found)
        self._weights.append(weight)
        return weight

    def look(self, number: int, outputs: Sequence[Tensor]) -> None:
        """Look at the loss of a batch that was weighed, or at parts of it; the first batch is looked at first.

        Args:
            number: of the batch.
            outputs: with their graphs.

        Raises:
            ValueError: the loss is a mean over something else than that of the first batch, a sum, or another function
                of those, such as a root.
        """
        if not self._guessed:
            return
        self._met, self._number = self._met if number == self._number else 0, number
        with unseen(), _disable_current_modes():
            nodes = [_behind_views(plain(t).grad_fn) for t in outputs]
            counts = list(_means_over(nodes))
            if number and _is_sum(nodes, self._weights[number], by_hand=not counts):
                raise ValueError(
                    "the losses of batches are sums over samples (reduction='sum', or .sum()), and would be averaged. "
                    "Pass reduction=SumOverBatches() to add them up; or reduction=MeanOverSamples(count=...), to weigh "
                    "them by a number of samples all the same."
                )
            losses = [node for t, node in zip(outputs, nodes, strict=True) if t.ndim == 0]
            if number and (outer := _curved(losses, self._weights[number])):
                raise ValueError(
                    f"the losses of batches are no means over samples but functions of such ({outer}), as the root of "
                    "a mean is, and their average is not that of all samples. Take the mean itself, as of squares; or "
                    "all samples as one batch; or reduction=MeanOverSamples(count=...), to average them all the same."
                )
            for count in counts:
                self._compare(count)

    def _compare(self, count: float) -> None:
        at, self._met = self._met, self._met + 1
        if self._number == 0:
            self._first.append(count)
        elif at < len(self._first):
            own, first, known = self._weights[self._number], self._weights[0], self._first[at]
            if count != known and not math.isclose(count * first, known * own, rel_tol=1e-4):
                raise ValueError(
                    f"the loss of batch 0 is a mean over {known:g} entries (without ignored ones, or weighed by "
                    f"class), and the batch counts as {first:g} samples; that of batch {self._number} is one over "
                    f"{count:g}, and counts as {own:g}. So weighed they do not make the mean over all. {_TELL}: "
                    "what its mean is over, such as (labels != -100).sum() or class_weights[labels].sum(); or its "
                    "number of samples, to weigh it so all the same."
                )


def _check_lengths(first: list[int], found: list[int]) -> None:
    if found == first:
        return
    alike = [a * first[0] == found[0] * b for a, b in zip(found, first, strict=False)]
    if len(found) != len(first) or (len(found) > 1 and not any(alike[1:])):
        raise ValueError(
            f"a batch counts as many samples as its first tensor is long, {first[0]} and {found[0]}, but none of the "
            f"other tensors goes with that: lengths are {first[:8]} and {found[:8]}. {_TELL} that returns its number "
            "of samples."
        )


def _means_over(nodes: list[Any]) -> Iterator[float]:
    """What the means that a loss is made of divide by."""
    seen, waiting = set(), nodes[::-1]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count = _count(node)
        if count is not None:
            yield count
        elif operator(node) in LINEAR:
            waiting += [parent for parent, _ in reversed(node.next_functions)]


def _is_sum(nodes: list[Any], samples: float, by_hand: bool) -> bool:
    """Whether a term of a loss is a sum over samples, and no mean written as a multiple of one.

    Args:
        nodes: that the loss is made of.
        samples: of the batch.
        by_hand: whether sums count that are no part of a loss of PyTorch's.
    """
    waiting = [(node, 1.0) for node in nodes]
    while waiting:
        node, multiple = waiting.pop()
        name = operator(node)
        plainly = by_hand and name == "Sum" and _of_samples(node, samples)
        if plainly or getattr(node, "_saved_reduction", None) == _SUM:
            if multiple * samples > 1 + 1e-6:
                return True
        elif name in ("Add", "Sub", "Neg", "Mul", *_VIEWS):
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            factor = _factor(node) if name == "Mul" else 1.0
            waiting += [(parent, multiple * factor) for parent in parents if factor is not None]
    return False


def _of_samples(node: Any, samples: float) -> bool:
    """Whether a sum is over what each sample has, without weights that might make it a mean."""
    sizes, below = _sizes(node), node.next_functions[0][0]
    while (name := operator(below)) in ("Pow", "Neg", "Abs", "Sum", "Mul", *_VIEWS):
        parents = below.next_functions
        if name == "Mul" and (len(parents) == 1 or parents[0] != parents[1]):
            return False
        below = parents[0][0]
    computed = below is not None and len(below.next_functions) > 0  # other than a parameter
    return computed and name != "Div" and len(sizes) > 0 and sizes[0] == samples


def _curved(nodes: list[Any], samples: float) -> str:
    """The operator, other than linear, that takes a number which stands for all samples; "" if there is none."""
    waiting, seen = [(node, "") for node in nodes], set()
    while waiting:
        node, outer = waiting.pop()
        name = operator(node)
        if node is None or (node, outer) in seen:
            continue
        seen.add((node, outer))
        if name in _NUMBERS or getattr(node, "_saved_reduction", None) in (_MEAN, _SUM):
            outer = outer if name not in _NUMBERS[2:] else name
            if outer and _over_first(node) and _of_samples(node, samples):
                return outer
            within = name in _NUMBERS[:2] and not (_over_first(node) and (*_sizes(node), 1)[0] % samples == 0)
            waiting += [(parent, outer) for parent, _ in node.next_functions if within]
        elif len(node.next_functions) == 1 or name in LINEAR:
            outer = outer or (name if name not in LINEAR else "")
            waiting += [(parent, outer) for parent, _ in node.next_functions]
    return ""


def _sizes(node: Any) -> Sequence[int]:
    """Of what a node takes."""
    return getattr(node, "_saved_self_sym_sizes", None) or node._saved_self.shape


def _over_first(node: Any) -> bool:
    """Whether a node makes one number of the first dimension of what it takes."""
    dims = getattr(node, "_saved_dim", None)
    dims = [dims] if isinstance(dims, int) else dims
    rank = len(_sizes(node))
    return not dims or any((d - 2**64 * (d >= 2**63)) % rank == 0 for d in dims)  # as if they had no signs


def _factor(node: Any) -> float | None:
    """The size of the number that a product is a multiple by; None if it is another product."""
    parents = [parent for parent, _ in node.next_functions]
    if len(parents) > 1 and None not in parents:
        return None
    other = node._saved_self if parents[0] is None else node._saved_other
    return abs(float(other)) if not isinstance(other, Tensor) or other.numel() == 1 else None


def _count(node: Any) -> float | None:
    """What a node divides by, if it is a mean."""
    name, (parent, _) = operator(node), node.next_functions[0] if node.next_functions else (None, 0)
    if name in _OF_LABELS:
        return float(node._saved_total_weight) if node._saved_reduction == _MEAN else None
    if getattr(node, "_saved_reduction", None) == _MEAN and hasattr(node, "_saved_self"):
        return float(node._saved_self.numel())
    if node.name() == "MeanBackward0":
        return float(node._saved_self_sym_numel)
    divisor = node._saved_other if name == "Div" and operator(parent) == "Sum" else None
    return float(divisor) if divisor is not None and divisor.numel() == 1 else None


def _behind_views(node: Any) -> Any:
    while operator(node) in _VIEWS:
        node = node.next_functions[0][0]
    return node
