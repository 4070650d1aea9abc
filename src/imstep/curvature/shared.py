"""A batch of which each process has its part: the sum of closures that are evaluated elsewhere, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.halves import HalvedTapeOperator
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.pieces import FrozenPieces, JointLinearisation, Observer
from imstep.curvature.products import Products, ShiftedProducts
from imstep.linalg import HalvedOperator
from imstep.linalg.sharded import ShardedTensor

_Own: TypeAlias = FrozenClosure | FrozenPieces


class SharedBatch:
    """f = Σ w_r f_r over the processes r, each of which evaluates f_r; the counterpart of `FrozenClosure`.

    Loss, gradient and whatever decisions are made by are the same in all processes, bit for bit. A part that fails ends
    the evaluation in all of them.

    Args:
        own: what this process evaluates; None for nothing.
        share: w_r, of this process; 0 for nothing.
        total: Σ w_r over the processes that evaluate something, > 0.
        parameters: the vector that is differentiated.
        penalty: added to f; None for nothing.
    """

    def __init__(
        self, own: _Own | None, share: float, total: float, parameters: ParameterVector, penalty: Penalty | None
    ) -> None:
        assert parameters.processes is not None
        self.own, self.share, self._total = own, share, total
        self._parameters, self.processes = parameters, parameters.processes
        self.penalty = penalty
        self.returned: Tensor | None = None
        self.used: list[bool] = []
        self._begun = False

    hook_factors = None
    """Hooks on parameters that change gradients are refused."""

    # --- evaluations --------------------------------------------------------------------------------------------

    def linearise(
        self, observer: AbstractContextManager[Any] | None = None, keep_graph: bool = False
    ) -> SharedLinearisation:
        """Loss and gradient, and this process's record."""
        own: list[Linearisation | JointLinearisation] = []

        def evaluate(frozen: _Own) -> tuple[Tensor, Tensor, bool, float]:
            own.append(frozen.linearise(observer, keep_graph=keep_graph))
            return own[0].loss.detach(), own[0].gradient, own[0].convex, own[0].repeats

        loss, gradient, convex, repeats = self._evaluated(evaluate)
        record = replace(own[0], penalty=None) if own else None
        return SharedLinearisation(loss, gradient, record, self.share, convex, repeats, self.penalty)

    def watched_gradient(self) -> tuple[Tensor, Tensor]:
        """As :meth:`gradient`, for a first evaluation without a record."""
        return self._evaluated(lambda frozen: (*frozen.watched_gradient(), True, 0.0))[:2]

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and gradient (n,) at the current parameters."""

        def evaluate(frozen: _Own) -> tuple[Tensor, Tensor]:
            with self._parameters.evaluated.taking_gradients():
                return frozen.gradient()

        (loss,), (gradient,) = self.total(evaluate, 1, 1)
        return self._penalised(loss, gradient, self.penalty_apart)

    def loss(self) -> Tensor:
        """The loss alone (0-dim) at the current parameters."""
        loss = self.total(lambda frozen: [frozen.loss()], 1)[0][0]
        apart = self.penalty_apart
        return loss if apart is None else loss + apart.value(self._parameters.get())

    def total(
        self, evaluate: Callable[[Any], Sequence[Tensor]], numbers: int, vectors: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The weighted sums over processes of what ``evaluate`` finds of a batch: numbers, and vectors (vectors, n)."""
        self._parameters.refresh()

        def part() -> Tensor | None:
            if self.own is None:
                return None
            with self._parameters.evaluated.weighing(self.share):
                found = [t.reshape(-1).to(self._parameters.dtype) for t in evaluate(self.own)]
            return self.share * torch.cat(found)

        return self._parameters.summed(part, numbers, vectors)

    def _evaluated(
        self, evaluate: Callable[[_Own], tuple[Tensor, Tensor, bool, float]]
    ) -> tuple[Tensor, Tensor, bool, float]:
        """Loss, gradient, whether the loss is convex in outputs, and the share evaluated anew for every product."""
        vector, own = self._parameters, self.own
        count = len(vector.tensors)
        vector.refresh()

        def part() -> Tensor | None:
            if own is None:
                return None
            evaluated = self._parameters.evaluated
            with evaluated.weighing(self.share), evaluated.taking_gradients():
                loss, gradient, convex, repeats = evaluate(own)
            value = own.returned
            number = 0.0 if value is None else float(value)
            facts = [not convex, value is None, own.hook_factors is not None, *own.used]
            weighed = self.share * torch.cat([loss.reshape(1).to(gradient), gradient])
            head = gradient.new_tensor([self.share * number, self.share * repeats, *facts])
            return torch.cat([head, weighed])

        found, (gradient,) = vector.summed(part, 6 + count, 1)
        numbers, (returned, repeats, bent, none, hooked) = found[5 : 5 + count], found[:5].tolist()
        loss = found[5 + count]
        if hooked:
            refuse_hooks()
        if not self._begun:
            self.returned = None if none else loss.new_tensor(returned)
            loss, gradient = self._penalised(
                loss, gradient, self.settle_penalty([bool(uses) for uses in numbers.tolist()])
            )
        else:
            loss, gradient = self._penalised(loss, gradient, self.penalty_apart)
        return loss, gradient, not bent, repeats / self._total

    def _penalised(self, loss: Tensor, gradient: Tensor, penalty: Penalty | None) -> tuple[Tensor, Tensor]:
        if penalty is None:
            return loss, gradient
        w = self._parameters.get()
        return loss + penalty.value(w), torch.addcmul(gradient, penalty.factors, w)

    @property
    def penalty_apart(self) -> Penalty | None:
        """The penalty, where no process adds it to what it evaluates: of sharded vectors."""
        return self.penalty if self._parameters.evaluated is not self._parameters else None

    def settle_penalty(self, used: Sequence[bool]) -> Penalty | None:
        """The penalty of the parameters that some process uses; from the second call on what the first found.

        Each process then adds its share of it to what it evaluates, unless vectors are sharded.
        """
        self.used = self.used or list(used)
        if self.penalty is not None and not self._begun:
            self.penalty = self.penalty.within(used, None)
            if self.own is not None and self.penalty_apart is None:
                self.own.take_penalty(self.penalty.times(1 / self._total, self._parameters.evaluated))
        self._begun = True
        return self.penalty

    # --- the same state for every evaluation --------------------------------------------------------------------

    @property
    def repeated(self) -> int:
        """Evaluations of this process made anew for products or for a preconditioner."""
        return 0 if self.own is None else self.own.repeated

    def doubt(self) -> None:
        """As :meth:`FrozenClosure.doubt`, of this process's part."""
        if self.own is not None:
            self.own.doubt()

    @property
    def compared(self) -> int:
        """Evaluations of this process made anew in doubt."""
        return 0 if self.own is None else self.own.compared

    def leave(self, accepted: bool) -> None:
        """End the step: random numbers and buffers of this process as after one evaluation, or as before it."""
        if self.own is not None:
            self.own.leave(accepted)

    def undo(self) -> None:
        """End the step as if no evaluation had been made."""
        if self.own is not None:
            self.own.undo()


@dataclass(frozen=True, eq=False)
class SharedLinearisation:
    """Loss and gradient of all, and the record of this process's part.

    Attributes:
        loss, gradient: as of a :class:`Linearisation`.
        own: this process's; None where it has no part.
        share: how much it counts.
        convex: whether the loss of every process is a convex function of outputs.
        repeats: the share of the batch that every product evaluates anew.
        penalty: what is added to the loss; it is in ``loss`` and ``gradient``, not in ``own``.
    """

    loss: Tensor
    gradient: Tensor
    own: Linearisation | JointLinearisation | None
    share: float
    convex: bool
    repeats: float
    penalty: Penalty | None = None

    @property
    def static(self) -> bool:
        """Whether this process's evaluation has repeated the structure of an earlier one."""
        return self.own is not None and self.own.static

    def matrix(
        self, parameters: ParameterVector, build: Callable[..., Any], definite: bool, graph: bool = False
    ) -> SymmetricOperator:
        """The weighted sum of the processes' matrices."""
        own = self.own
        matrix = None if own is None else lambda: own.matrix(parameters.evaluated, build, definite, graph)
        source: Products = SharedProducts(parameters, matrix, self.share)
        if self.penalty is not None:
            source = ShiftedProducts(source, self.penalty.factors)
        return SharedOperator(parameters, source, definite, matrix)

    def evaluations(self, observer: Observer) -> Iterator[tuple[float, Linearisation, Observer]]:
        """Each evaluation of this process with its weight and its observer; what comes of them is summed by the caller.
        """
        if self.own is not None:
            for weight, at, own in self.own.evaluations(observer):
                yield self.share * weight, at, own


class SharedProducts(Products):
    """Products with the weighted sum of the processes' matrices: one all-reduce for a product or for a block.

    Args:
        parameters: rows and columns.
        own: builds this process's matrix, at the first product; None where it has none.
        share: how much it counts.
    """

    def __init__(
        self, parameters: ParameterVector, own: Callable[[], SymmetricOperator] | None, share: float
    ) -> None:
        super().__init__(parameters, parameters)
        self._parameters, self._own, self._share = parameters, own, share
        self._built: SymmetricOperator | None = None

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return 0 if self._built is None else self._built.nbytes

    def one(self, direction: Tensor) -> Tensor:
        return self._product(direction)[0]

    def several(self, directions: Tensor) -> Tensor:
        if isinstance(directions, ShardedTensor) and not self._parameters.blockwise:
            return torch.stack([self.one(direction) for direction in directions])
        return self._product(directions)

    def _product(self, directions: Tensor) -> Tensor:
        """With a vector (n,) or a block (k, n); (k, n)."""
        # Of whole vectors the products are whole, of sharded ones sharded.
        evaluated = self._parameters.evaluated
        vector = self._parameters if isinstance(directions, ShardedTensor) else evaluated
        with vector.along(directions) as given:

            def part() -> Tensor | None:
                if self._own is None:
                    return None
                own = self._built = self._built or self._own()
                taken = given if own.streams else evaluated.gathered(given)
                with evaluated.weighing(self._share):
                    product = own.matvec(taken) if taken.ndim == 1 else own.matmat(taken.t()).t()
                    return self._share * product.reshape(-1)

            return vector.summed(part, 0, 1 if directions.ndim == 1 else len(directions), directions)[1]


class SharedOperator(SymmetricOperator):
    """The sum of the processes' matrices.

    Args:
        parameters, source, definite: see :class:`SymmetricOperator`.
        own: builds this process's matrix; None where it has none.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        source: Products,
        definite: bool,
        own: Callable[[], SymmetricOperator] | None,
    ) -> None:
        super().__init__(parameters, source, definite)
        self.own = own


class HalvedSharedOperator(SharedOperator, HalvedOperator):
    """A curvature matrix that also tells how far two halves of the batch agree: the halves of every process's part.

    Args:
        operator: of ``point``.
        point: with the graph of its loss.

    Raises (in the first product, in all processes):
        ValueError: see :class:`HalvedTapeOperator`.
    """

    def __init__(self, operator: SharedOperator, point: SharedLinearisation) -> None:
        super().__init__(operator.parameters, operator._forward, operator.definite, operator.own)
        self._point = point
        self._halved: HalvedTapeOperator | None = None

    def measure(self, vector: Tensor) -> tuple[Tensor, float, float]:
        self.products += 1
        with self.parameters.along(vector) as given:

            def part() -> Tensor | None:
                if self.own is None or self._point.own is None:
                    return None
                self._halved = self._halved or HalvedTapeOperator(self.own(), self._point.own)
                image, *curvatures = self._halved.measure(self.parameters.evaluated.gathered(given))
                return self._point.share * torch.cat([image.new_tensor(curvatures), image])

            halves, (image,) = self.parameters.summed(part, 2, 1, vector)
        penalty = self._point.penalty
        if penalty is not None:  # of no examples
            image, halves = torch.addcmul(image, penalty.factors, vector), halves + vector @ (penalty.factors * vector)
        return image, *halves.tolist()


def halved(operator: SymmetricOperator, point: Any) -> HalvedTapeOperator | HalvedSharedOperator:
    """The matrix of a point, so that it tells the curvatures of the two halves of the batch."""
    if isinstance(operator, SharedOperator):
        return HalvedSharedOperator(operator, point)
    return HalvedTapeOperator(operator, point)


def refuse_hooks() -> NoReturn:
    """Raise where a hook changes the gradient of a parameter."""
    raise ValueError(
        "a hook changes the gradient of a parameter, and with a process_group it is not known to do the same "
        "in every process. Remove it; to hold parameters fixed, set requires_grad=False."
    )
