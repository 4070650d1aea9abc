"""What a minimisation has found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imstep.optim.record import StepRecord
from imstep.optim.stopping_tests import Termination


@dataclass(frozen=True, eq=False)
class IntermediateResult:
    """A point on the way, as a callback sees it.

    Attributes:
        x: the point, of the shape and dtype of x0; a copy.
        fun: the function there.
        nit: steps so far.
        record: of the step that led there.
    """

    x: Tensor
    fun: float
    nit: int
    record: StepRecord


@dataclass(frozen=True, eq=False, repr=False)
class MinimizeResult:
    """What :func:`minimize` found.

    Attributes:
        x: the best point, of the shape and dtype of x0.
        fun: the function there.
        grad: its gradient there, of the shape of ``x``.
        nit: steps taken.
        nfev: evaluations of the function, with or without a gradient.
        njev: those with a gradient, or backward passes for a Jacobian.
        nhev: products with the Hessian, or with what stands for it.
        termination: why it ended.
        records: one :class:`StepRecord` a step.
    """

    x: Tensor
    fun: float
    grad: Tensor
    nit: int
    nfev: int
    njev: int
    nhev: int
    termination: Termination
    records: tuple[StepRecord, ...]

    @property
    def success(self) -> bool:
        """Whether ``x`` is a minimum, as far as the tests can tell."""
        return self.termination.success

    @property
    def status(self) -> int:
        """SciPy's number for the termination: 0 for success."""
        return self.termination.status

    @property
    def message(self) -> str:
        """A sentence that explains the termination."""
        return self.termination.message

    def __repr__(self) -> str:
        names = ("message", "success", "status", "fun", "x", "grad", "nit", "nfev", "njev", "nhev")
        lines = []
        for name in names:
            first, *rest = str(getattr(self, name)).split("\n")
            lines += [f"{name:>8}: {first}", *(" " * 10 + line for line in rest)]
        return "\n".join(lines)
