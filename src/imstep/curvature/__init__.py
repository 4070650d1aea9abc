"""Curvature of a model's loss as linear operators on flat vectors."""

from imstep.curvature.batches import BatchOperator
from imstep.curvature.exact_diagonal import GaussNewtonDiagonal
from imstep.curvature.fisher import Empirical, Exact, Expectation, Fisher, MonteCarlo
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.gauss_newton import GaussNewton
from imstep.curvature.hessian import Hessian
from imstep.curvature.jacobian import Jacobian
from imstep.curvature.kfac import EKFAC, KFAC
from imstep.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.curvature.reduction import MeanOverSamples, Reduction, SumOverBatches
from imstep.curvature.residual_jacobian import ResidualJacobian
from imstep.curvature.squares import NoResidualsError
from imstep.curvature.staleness import StaleLossError
from imstep.curvature.structural import StructuralDamping

__all__ = [
    "EKFAC",
    "KFAC",
    "BatchOperator",
    "Bernoulli",
    "Categorical",
    "Empirical",
    "Exact",
    "Expectation",
    "Fisher",
    "FrozenClosure",
    "GaussNewton",
    "GaussNewtonDiagonal",
    "Gaussian",
    "Hessian",
    "Jacobian",
    "Likelihood",
    "MeanOverSamples",
    "MonteCarlo",
    "NoResidualsError",
    "OtherProcessError",
    "ParameterVector",
    "Poisson",
    "ProcessesLostError",
    "Reduction",
    "ResidualJacobian",
    "StaleLossError",
    "StructuralDamping",
    "SumOverBatches",
]
