"""How far a point is from a minimum, to second order, in measures that no unit enters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.hessian import hessian_of
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.operators import TapeOperator
from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator, ProgressStall, RelativeResidual, conjugate_gradient
from imstep.linalg.random_maps import random_signs
from imstep.optim.direction import Direction, Escape, escape_direction

MATRIX_LIMIT = 100
"""Parameters up to which the matrix itself is taken, by one block of products."""

_SWEEPS = 8
_PRODUCTS = 100
_RESIDUAL = 1e-2
_FLOOR = 100
"""Rounding of an eigenvalue of an equilibrated matrix, in n times the spacing of its numbers."""


@dataclass(frozen=True, eq=False)
class Stationarity:
    """What Newton's model says of a point.

    Attributes:
        gradient_norm: ‖g‖.
        decrease: how far Newton's full step s would lower f, by the model. Parts of g that are within what rounding x
            makes of it, u |H||x|, are left out.
        step: ‖D s‖ / ‖D x‖, with D from the columns of H, so that units of x cancel; D = 1 beyond ``MATRIX_LIMIT``
            parameters. With typical sizes y each entry is measured by what is larger, D_i y_i or ‖D x‖.
        at_rounding: whether all of g is within rounding.
        hidden: whether any of it is, and was left out.
        extent: xᵀ|H|x where entries are their magnitudes, what the model tells of moving x by its own size, where H is
            0 or has negative curvature and no entry is held, so that f may be flat here; else infinite.
        escape: a direction of negative curvature, beyond what rounding may have made; None if none was found.
        newton: s itself, by the magnitudes of curvature; None beyond ``MATRIX_LIMIT`` parameters.
        products: spent.
    """

    gradient_norm: float
    decrease: float
    step: float
    at_rounding: bool
    hidden: bool
    extent: float
    escape: Escape | None
    newton: Direction | None
    products: int


def stationarity_at(
    point: Linearisation,
    parameters: ParameterVector,
    typical: Tensor | None = None,
    held: Tensor | None = None,
    seed: int = 0,
) -> Stationarity:
    """Measure a point with finite loss and gradient.

    Args:
        point: loss, gradient and derivative at the parameters as they are.
        parameters: the vector.
        typical: sizes y (n,) that entries of ``step`` may be small beside; None for their own alone.
        held: entries (n,) that bounds hold back, which are left out.
        seed: of the random start of Lanczos' method, beyond ``MATRIX_LIMIT`` parameters.

    Cost: n products at once up to ``MATRIX_LIMIT`` parameters, then 32 for the curvature and up to 100 for the step.
    """
    whole = hessian_of(point, parameters)
    hessian: TapeOperator | _Face = whole
    x, gradient = parameters.get(), point.gradient
    typical = torch.zeros_like(x) if typical is None else typical
    if held is not None:
        hessian = _Face(whole, held)
        gradient, x = gradient.masked_fill(held, 0.0), x.masked_fill(held, 0.0)
    measure = _by_matrix if hessian.size <= MATRIX_LIMIT else _by_products
    return measure(hessian, gradient, x, typical, seed)


class _Face(LinearOperator):
    """A Hessian on the entries that are free."""

    def __init__(self, hessian: TapeOperator, held: Tensor) -> None:
        super().__init__(hessian.size, hessian.dtype, hessian.device)
        self._hessian, self._held = hessian, held

    def matvec(self, vector: Tensor) -> Tensor:
        return (self._hessian @ vector.masked_fill(self._held, 0.0)).masked_fill(self._held, 0.0)

    def matmat(self, block: Tensor) -> Tensor:
        held = self._held[:, None]
        return (self._hessian @ block.masked_fill(held, 0.0)).masked_fill(held, 0.0)

    @property
    def holds(self) -> bool:
        """Whether it leaves any entry out."""
        return bool(self._held.any())

    @property
    def products(self) -> int:
        """As of the Hessian."""
        return self._hessian.products


def _by_matrix(operator: TapeOperator | _Face, gradient: Tensor, x: Tensor, typical: Tensor, seed: int) -> Stationarity:
    del seed
    whole = not (isinstance(operator, _Face) and operator.holds)
    eps = torch.finfo(gradient.dtype).eps
    units = torch.where(x == 0, 1.0, x.abs())  # in which columns stay within the range of numbers, as g does
    matrix = (operator @ units.diag()).double() / units.double()
    matrix, g, x = (matrix + matrix.mT) / 2, gradient.double(), x.double()
    n, norm = operator.size, float(g.norm())
    if not bool(matrix.isfinite().all()):
        return Stationarity(norm, math.inf, math.inf, False, False, math.inf, None, None, n)
    scale = equilibration(matrix)
    values, vectors = torch.linalg.eigh(matrix / scale / scale[:, None])
    parts, noise = vectors.mT @ (g / scale), vectors.mT.abs() @ (eps * (matrix.abs() @ x.abs()) / scale)
    hidden = bool(((parts != 0) & (parts.abs() <= noise)).any())
    parts = torch.where(parts.abs() <= noise, 0.0, parts)
    floor = _FLOOR * n * eps
    divisors = values.abs().clamp(min=floor)
    step = parts / divisors
    escape, along_x = None, float(x.abs() @ matrix.abs() @ x.abs())
    if float(values[0]) < -floor:
        vector = vectors[:, 0] / scale
        escape = Escape.along(vector, matrix @ vector, g, along_x / (float(x @ x) or 1.0), gradient.dtype)
    return Stationarity(
        gradient_norm=norm,
        decrease=float(parts @ step) / 2,
        step=_relative(step, scale * x * matrix.any(1), scale * typical.double()),
        at_rounding=not parts.any(),
        hidden=hidden,
        extent=along_x if whole and (escape or not matrix.any()) else math.inf,
        escape=escape,
        newton=Direction.along(-(vectors @ step) / scale, matrix, g, gradient.dtype),
        products=n,
    )


def _by_products(
    operator: TapeOperator | _Face, gradient: Tensor, x: Tensor, typical: Tensor, seed: int
) -> Stationarity:
    eps, norm = torch.finfo(gradient.dtype).eps, float(gradient.norm())
    escape = escape_direction(operator, gradient, seed)
    signs = random_signs(x.shape, x.dtype, torch.Generator().manual_seed(seed)).to(x)
    at_rounding = norm <= eps * float((operator @ (x * signs)).norm())
    decrease = step = 0.0
    if not at_rounding:
        rules = (RelativeResidual(_RESIDUAL), ProgressStall())
        solved = conjugate_gradient(operator, -gradient, stopping=rules, max_iterations=_PRODUCTS)
        decrease, step = solved.predicted_decrease, _relative(solved.solution, x, typical)
        if solved.iterations == 0:  # the curvature along g is not positive: nothing is known
            decrease = step = math.inf
    return Stationarity(norm, decrease, step, at_rounding, False, math.inf, escape, None, operator.products)


def _relative(step: Tensor, x: Tensor, typical: Tensor) -> float:
    """The norm of a step (n,) whose entries are measured by ‖x‖, or by their typical sizes where these are larger."""
    moved = step != 0
    return float((step[moved] / typical.abs().clamp(min=float(x.norm()))[moved]).norm())


def equilibration(matrix: Tensor) -> Tensor:
    """D > 0, (n,), with which the largest entry of each row of |D⁻¹ H D⁻¹| is about 1; 1 for a row of zeros.

    Source: Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034.
    """
    scale = torch.ones_like(matrix[0])
    for _ in range(_SWEEPS):
        largest = (matrix / scale / scale[:, None]).abs().amax(1)
        scale = torch.where(largest > 0, scale * largest.sqrt(), scale)
    return scale
