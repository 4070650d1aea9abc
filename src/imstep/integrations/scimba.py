"""Scimba, which takes optimizers of a class of its own only."""

from __future__ import annotations

from collections.abc import Callable

from scimba_torch.optimizers.scimba_optimizers import ScimbaCustomOptomizer

from imstep.optim import LeastSquares, NewtonKrylov


class ScimbaLeastSquares(ScimbaCustomOptomizer, LeastSquares):
    """:class:`imstep.LeastSquares` for Scimba's projectors, for losses that are sums of squares.

    Options go into ``"optimizer_args"``, as for Scimba's own optimizers, and ``"scheduler"`` and ``"scheduler_args"``
    make a schedule; without them there is none.

    Example:
        Needs scimba; ``pde`` is a problem of Scimba's in strong form::

            PinnsElliptic(pde, optimizers=OptimizerData({"class": ScimbaLeastSquares})).solve(epochs=50)
    """

    step = LeastSquares.step  # Scimba's own, an abstract one, comes first

    def inner_step(self, closure: Callable[[], float]) -> None:
        """One step with Scimba's closure."""
        self.step(closure)


class ScimbaNewtonKrylov(ScimbaCustomOptomizer, NewtonKrylov):
    """:class:`imstep.NewtonKrylov` for Scimba's projectors; used as :class:`ScimbaLeastSquares` is."""

    step = NewtonKrylov.step

    def inner_step(self, closure: Callable[[], float]) -> None:
        """One step with Scimba's closure."""
        self.step(closure)
