"""The Hessian of a closure's loss, as a linear operator."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from imstep.complexstep.tape import TapeChangedError
from imstep.curvature.frozen import Closure, FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator


class Hessian(LinearOperator):
    """The Hessian of the loss that ``closure`` returns, at the parameters' values when it was built.

        H v = d/dt ∇f(w + t v) at t = 0  =  Im ∇f(w + ihv) / h

    Building it evaluates the closure once and records the derivative of the gradient; a product replays the record
    for a direction, without running the model again.

    Args:
        closure: returns the loss, a tensor with one entry; it may also call ``zero_grad()`` and ``backward()``.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.

    Attributes:
        loss: f(w), a 0-dim tensor.
        gradient: ∇f(w), (n,).
        products: how many products were made, a block of k counting k.

    Raises:
        ValueError, TypeError: see :class:`ParameterVector`; the closure returned no usable loss.
        UnsupportedOperatorError: the closure uses an operator without a rule.

    Cost: one gradient and the memory of its intermediate values to build; two gradients a product.

    Source: Pearlmutter, Neural Computation 6 (1994), 147-160, section 3, in its complex-step form.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> H = Hessian(lambda: (w ** 3).sum(), [w])
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([ 6., 12.])
        >>> H.loss, H.gradient
        (tensor(9.), tensor([ 3., 12.]))
    """

    def __init__(self, closure: Closure, params: nn.Module | Iterable[Tensor]) -> None:
        self.parameters = ParameterVector(params)
        frozen = FrozenClosure(closure, self.parameters)
        try:
            self._setup(frozen)
        finally:
            frozen.leave(accepted=True)

    @classmethod
    def at(cls, frozen: FrozenClosure, parameters: ParameterVector) -> Hessian:
        """The Hessian of a closure that is evaluated elsewhere too, as in a step of an optimizer."""
        self = cls.__new__(cls)
        self.parameters = parameters
        self._setup(frozen)
        return self

    def _setup(self, frozen: FrozenClosure) -> None:
        super().__init__(self.parameters.size, self.parameters.dtype, self.parameters.device)
        self.products = 0
        point = frozen.linearise()
        self.loss, self.gradient, self._tape = point.loss, point.gradient, point.tape

    @property
    def nbytes(self) -> int:
        """Bytes that the recorded derivative keeps alive, the parameters included."""
        return self._tape.nbytes

    def matvec(self, vector: Tensor) -> Tensor:
        self._tape.check()
        self.products += 1
        with torch.no_grad():
            return self.parameters.flatten(self._tape.replay(self.parameters.unflatten(vector)))

    def matmat(self, block: Tensor) -> Tensor:
        self._tape.check()
        self.products += block.shape[1]
        if block.shape[1] == 0:
            return torch.empty_like(block)
        apply = lambda v: self.parameters.flatten(self._tape.replay(self.parameters.unflatten(v)))
        with torch.no_grad():
            return torch.vmap(apply, in_dims=1, out_dims=1)(block)


__all__ = ["Hessian", "TapeChangedError"]
