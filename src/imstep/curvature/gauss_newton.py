"""The Gauss-Newton matrix of a loss of a model's outputs as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from imstep.complexstep import Arithmetic
from imstep.complexstep.gauss_newton import gauss_newton
from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.loss_split import LossSplit, split_loss
from imstep.complexstep.tape import Tape
from imstep.curvature.backward import scalar
from imstep.curvature.batches import ROOM_FOR_RECORDS, BatchOperator, ProgressCallback, Series, over
from imstep.curvature.closure import usable
from imstep.curvature.evaluation import BatchCurvature, Point
from imstep.curvature.operators import PointOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.products import ReplayedProducts
from imstep.curvature.reduction import Reduction, SumOverBatches
from imstep.curvature.sharded import parameters_of
from imstep.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
class GaussNewton(PointOperator):
    """The Gauss-Newton matrix of a loss L of a model's outputs, at the parameters' values when it was built.

        G v = Jᵀ L'' J v,   J the Jacobian of the outputs, L'' the Hessian of the loss in the outputs

    Args:
        closure: returns ``(outputs, targets)``; outputs are a tensor, or tensors in tuples, lists or dictionaries.
        params: as for :class:`Hessian`.
        loss: maps outputs and targets to a scalar; any function. If it is not convex in the outputs, G may be
            indefinite; if it is linear in them, as ``nn.NLLLoss`` of log-probabilities is, G vanishes: let the closure
            return logits then. What a loss adds of the parameters alone, weight decay for instance, stays exact.
        memory_budget: as for :class:`Hessian`.

    Attributes: see :class:`PointOperator`; ``definite`` is True where the loss is recognised as convex, made of
        squares, exponentials, PyTorch's mean squared error, cross entropy, binary cross entropy, soft margin, Huber or
        smooth L1 losses of the outputs themselves, by sums, means and positive factors, and of terms linear in the
        outputs.

    Raises: as for :class:`Hessian`; ``TypeError`` where the closure returned no pair; ``ValueError`` where what it
        returned does not depend on the parameters.

    Cost: as :class:`Hessian` to build; 4/3 of a gradient a product; beyond the memory budget about two gradients.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738, section 3.

    Example:
        >>> import torch
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> G = GaussNewton(lambda: (model(x), torch.zeros(1, 1)), model)
        >>> G.to_dense()
        tensor([[2., 4.],
                [4., 8.]])
    """

    def __init__(
        self,
        closure: Callable[[], tuple[Any, Any]],
        params: nn.Module | Iterable[Tensor],
        loss: Callable[[Any, Any], Tensor] | None = None,
        memory_budget: int | None = None,
    ) -> None:
        parameters = ParameterVector(params)
        curvature = BatchGaussNewton(LossOfOutputs(closure, loss or nn.MSELoss()), parameters)
        super().__init__(parameters, curvature.once(memory_budget))

    @classmethod
    def over(
        cls,
        batches: Iterable[Any],
        closure: Callable[[Any], tuple[Any, Any]],
        params: nn.Module | Iterable[Tensor],
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        reduction: Reduction | None = None,
        memory_budget: int | None = ROOM_FOR_RECORDS,
        progress: ProgressCallback | None = None,
        process_group: ProcessGroup | None = None,
    ) -> BatchOperator:
        """The Gauss-Newton matrix of the loss over all ``batches``; see :meth:`Hessian.over`.

        Args:
            closure: called with a batch, returns ``(outputs, targets)``.
            loss: as for :class:`GaussNewton`.
            reduction: as for :meth:`Hessian.over`; the default is ``SumOverBatches()`` for a loss whose ``reduction``
                is "sum".
        """
        evaluate = loss or nn.MSELoss()
        if reduction is None and getattr(evaluate, "reduction", None) == "sum":
            reduction = SumOverBatches()
        kind = lambda f, vector, number: BatchGaussNewton(LossOfOutputs(f, evaluate), vector)
        parameters = parameters_of(params, process_group)
        return over(Series(batches, closure, parameters, kind), reduction, memory_budget, progress)


class LossOfOutputs:
    """A closure in two parts, of which the second counts as the loss.

    Args:
        outputs: returns the arguments of ``loss``, of which those that depend on the parameters are the outputs.
        loss: returns a scalar.
        convex: whether the loss is known to be convex in the outputs.

    Attributes:
        nodes: numbers of the nodes of autograd's graph that the loss made in the last evaluation.
    """

    def __init__(self, outputs: Callable[[], Sequence[Any]], loss: Callable[..., Tensor], convex: bool = False) -> None:
        self._outputs, self._loss, self.convex = outputs, loss, convex
        self.nodes = range(0)

    def __call__(self) -> Tensor:
        return self.loss(self.outputs())

    def outputs(self) -> tuple[Any, ...]:
        """The first part."""
        arguments = self._outputs()
        if not isinstance(arguments, (tuple, list)):
            raise TypeError(
                f"closure returned {type(arguments).__name__}; a Gauss-Newton matrix needs the model's outputs and the "
                "targets apart. Return (outputs, targets), and pass the loss as a function of both."
            )
        return tuple(arguments)

    def loss(self, arguments: tuple[Any, ...]) -> Tensor:
        """The second part."""
        first = torch.autograd._get_sequence_nr()
        loss = self._loss(*arguments)
        self.nodes = range(first, torch.autograd._get_sequence_nr())
        given = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(arguments))
        if not given and isinstance(loss, Tensor) and loss.requires_grad and not self.sources(loss):
            raise ValueError(
                "what the closure returned does not depend on the parameters, and the loss does: it would count as "
                "terms of the parameters alone, and the Gauss-Newton matrix be the Hessian. Let the closure run the "
                "model and return (outputs, targets); the loss is a function of these."
            )
        return loss

    def sources(self, loss: Tensor) -> set[Any]:
        """Nodes of autograd's graph that the loss of the last evaluation is computed from, parameters apart."""
        with unseen(), _disable_current_modes():
            waiting, seen, found = [plain(loss).grad_fn], set(), set()
            while waiting:
                node = waiting.pop()
                if node is None or node in seen or node.name() == "torch::autograd::AccumulateGrad":
                    continue
                seen.add(node)
                if node._sequence_nr() < self.nodes.start:
                    found.add(node)
                else:
                    waiting += [parent for parent, _ in node.next_functions]
        return found


class BatchGaussNewton(BatchCurvature):
    """The Gauss-Newton matrix of a closure in two parts on its batch."""

    def __init__(self, model: LossOfOutputs, parameters: ParameterVector) -> None:
        super().__init__(model, parameters)
        self._model = model

    def record(self, memory_budget: int | None) -> Point:
        at = self.frozen.linearise(memory_budget=memory_budget, cotangents=True)
        tape = gauss_newton(at.tape, self._model.nodes)
        source = ReplayedProducts(tape, self.parameters, self.parameters)
        return Point(at.loss, at.gradient, source, self._definite(at.tape, at.split), at.report)

    def without_record(self, reason: str) -> Point:
        # Of the loss alone a record is small; the parameters are inputs of it for what bypasses the outputs.
        tape = Tape()
        arithmetic = self.frozen.arithmetic(tape=tape)
        loss, gradients = self._differentiate(arithmetic, [], lambda g: g)
        definite = self._definite(tape, split_loss(tape, arithmetic.reference(loss)))
        return self.recomputed(loss.detach(), self.parameters.flatten(usable(gradients)), definite, reason)

    def loss_and_product(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        arithmetic = self.frozen.arithmetic()
        part = lambda g: arithmetic.value(g).im
        loss, products = self._differentiate(arithmetic, self.parameters.unflatten(direction), part)
        self.frozen.report = arithmetic.report()
        return loss.detach(), self.parameters.flatten(products)

    def _definite(self, tape: Tape, split: LossSplit | None) -> bool:
        """Whether the loss is convex in the outputs themselves: all that it computes belongs to convex ends."""
        if self._model.convex or split is None:
            return self._model.convex
        own = {step.node for step in tape.steps if not step.backward}
        return split.between.issubset(self._model.nodes) and own.intersection(self._model.nodes) <= split.nodes

    def _differentiate(
        self, arithmetic: Arithmetic, directions: Sequence[Tensor], part: Callable[[Tensor], Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and Jᵀu + w: u, w what ``part`` takes of its gradients with respect to outputs and parameters."""
        tensors = self.parameters.tensors
        with self.frozen.perturbed(arithmetic, directions):
            with self.frozen.user.surroundings.entered():
                arguments, structure = tree_flatten(self._model.outputs())
            arguments = [plain(t) if isinstance(t, Tensor) else t for t in arguments]
            outputs = {id(t): t for t in arguments if isinstance(t, Tensor) and t.requires_grad}
            self.frozen.check_sight(list(outputs.values()), arithmetic)
            copies = {key: _copy(arithmetic, t) for key, t in outputs.items()}
            if not directions:
                for p in tensors:
                    arithmetic.attach(p)
            # Another copy, so that the loss may overwrite it.
            given = [copies[id(t)].clone() if id(t) in copies else t for t in arguments]
            known = {plain(t).grad_fn for t in given if isinstance(t, Tensor)}
            with self.frozen.user.surroundings.entered():
                loss = scalar(self._model.loss(tree_unflatten(given, structure)))
            if not self._model.sources(loss) <= known:
                raise TypeError(
                    "products without a record see the model's outputs in tuples, lists and dictionaries alone, and "
                    "this loss reads others. Return outputs as such, or raise memory_budget."
                )
            if self.frozen.user.look is not None and not directions:
                self.frozen.user.look([loss])
            gradients = arithmetic.gradient(loss, [*copies.values(), *tensors])
            parts = [None if g is None else part(g) for g in gradients]
        weights, around = parts[: len(copies)], parts[len(copies) :]
        weighted = [(t, u) for t, u in zip(outputs.values(), weights, strict=True) if u is not None]
        if not weighted:
            return loss, around
        through = arithmetic.pullback([t for t, _ in weighted], tensors, [u for _, u in weighted])
        return loss, [_sum(a, b) for a, b in zip(through, around, strict=True)]


def _copy(arithmetic: Arithmetic, t: Tensor) -> Tensor:
    """A leaf with the value of ``t``, imaginary part included."""
    return arithmetic.number(t, arithmetic.value(t).imaginary).requires_grad_()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
