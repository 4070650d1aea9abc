"""Which matrix stands for the curvature of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from imstep.curvature.frozen import Linearisation
from imstep.curvature.hessian import TapeOperator, gauss_newton_of, hessian_of
from imstep.curvature.parameters import ParameterVector

class CurvatureChoice(ABC):
    """Chooses the curvature matrix at a point; both matrices are read off the same record."""

    @abstractmethod
    def at(self, point: Linearisation, parameters: ParameterVector) -> TapeOperator:
        """The matrix for the step at ``point``."""


@dataclass(frozen=True)
class ExactHessian(CurvatureChoice):
    """The Hessian itself, of any loss: negative curvature is seen, and convergence is superlinear."""

    def at(self, point: Linearisation, parameters: ParameterVector) -> TapeOperator:
        return hessian_of(point, parameters)


@dataclass(frozen=True)
class GaussNewtonIfConvex(CurvatureChoice):
    """The Gauss-Newton matrix where the loss is a convex function of outputs, else the Hessian.

    It is positive semidefinite and a third cheaper per product. For linear models both are the same.

    Source: Schraudolph, Neural Computation 14 (2002), 1723-1738; as the default our choice by measurement.
    """

    def at(self, point: Linearisation, parameters: ParameterVector) -> TapeOperator:
        operator = gauss_newton_of(point, parameters)
        if operator is None:
            return ExactHessian().at(point, parameters)
        return operator
