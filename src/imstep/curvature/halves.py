"""The curvature of a batch's halves, from the pass that makes the product of the whole."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from imstep.complexstep import hvp
from imstep.complexstep.islands import plain
from imstep.complexstep.loss_split import ConvexLoss
from imstep.curvature.direct import of_parameters
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import SymmetricOperator, TapeOperator
from imstep.curvature.pieces import Linearised
from imstep.curvature.sampling import end_weights
from imstep.linalg import HalvedOperator


class HalvedTapeOperator(TapeOperator, HalvedOperator):
    """A curvature matrix at a point that also tells how far two halves of the batch agree on it.

    The Gauss-Newton curvature of a batch is a sum over its examples, vᵀGv = Σᵢ (Jv)ᵢᵀ L''ᵢ (Jv)ᵢ, and Jv passes by in
    every product. With g₁, g₂ these sums over the examples of even and odd number, each scaled to the batch,

        c₁,₂ = vᵀAv ± (g₁ - g₂)/2,

    for the Hessian as well, of which the examples' share is not told apart: its noise is taken to be that of its
    Gauss-Newton part.

    Args:
        operator: the Hessian or the Gauss-Newton matrix at the point.
        point: with the graph of its loss.

    Raises:
        ValueError: the loss has no convex end, so that nothing is known of its examples.

    Cost: a product, and the loss's own Hessian product on the outputs.

    Source: our own choice; examples are numbered along the first dimension of what the loss is computed from.
    """

    def __init__(self, operator: SymmetricOperator, point: Linearised) -> None:
        if isinstance(point, Linearisation) and not isinstance(operator, TapeOperator):
            raise ValueError(
                "the noise test compares the curvatures of a batch's halves, which this Fisher matrix does not tell "
                "apart. Leave the test out (noise=None), or use the exact Fisher matrix."
            )
        if not isinstance(operator, TapeOperator) or not isinstance(point, Linearisation):
            raise ValueError(
                "the noise test compares the curvatures of a batch's halves, and this batch comes in pieces. Leave the "
                "test out (noise=None), or give the batch as one."
            )
        if point.split is None:
            raise ValueError(
                "the noise test compares the curvatures of a batch's halves, but this loss is not recognised as a "
                "convex function of outputs, one for each example. Use a loss made of squares, cross entropies or "
                "Huber terms, or leave the test out (noise=None)."
            )
        self._ends = [end for end in point.split.losses if not of_parameters(end.z)]  # weight decay is of no examples
        self._weights = end_weights(point.loss, self._ends) if self._ends else []
        self._watched = operator.tape.watching([reference for end in self._ends for reference in end.references])
        super().__init__(operator.parameters, operator.tape, operator.definite, operator.penalty)

    def measure(self, vector: Tensor) -> tuple[Tensor, float, float]:
        self.check()
        self.products += 1
        parts = self.parameters.unflatten(vector)
        with torch.no_grad():
            changes = self._watched.replay(parts)
        image, seen = self.parameters.flatten(changes[: len(parts)]), changes[len(parts) :]
        if self.penalty is not None:  # of no examples
            image.addcmul_(self.penalty.factors, vector)
        curvature, spread = float(vector @ image), 0.0
        for end, weight in zip(self._ends, self._weights, strict=True):
            given, seen = seen[: len(end.references)], seen[len(end.references) :]
            spread += _difference(_by_example(end, weight, given)) / 2
        return image, curvature + spread, curvature - spread


def _by_example(end: ConvexLoss, weight: Tensor, changes: list[Tensor | None]) -> Tensor:
    """(Jv)ᵢᵀ L''ᵢ (Jv)ᵢ of every example, (examples,)."""
    values = [plain(end.args[at]).detach() for at in end.positions]
    given = [torch.zeros_like(z) if change is None else change for z, change in zip(values, changes, strict=True)]
    if end.func is torch.ops.aten.mul.Tensor:  # z times itself
        form = 2 * weight * given[0] ** 2
    else:
        products = hvp(lambda arguments: (end.value(*arguments) * weight).sum(), values, given)
        form = reduce(torch.add, (u * p for u, p in zip(given, products, strict=True)))
    return form.reshape(len(form), -1).sum(1) if form.ndim else form.reshape(1)


def _difference(by_example: Tensor) -> float:
    """The sum over even examples less that over odd ones, each scaled to all examples."""
    n = len(by_example)
    if n < 2:
        return 0.0
    return n * float(by_example[0::2].double().mean() - by_example[1::2].double().mean())
