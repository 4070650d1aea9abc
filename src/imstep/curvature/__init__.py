"""Curvature of a model's loss as linear operators on flat vectors."""

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.hessian import GaussNewton, Hessian
from imstep.curvature.parameters import ParameterVector

__all__ = ["FrozenClosure", "GaussNewton", "Hessian", "ParameterVector"]
