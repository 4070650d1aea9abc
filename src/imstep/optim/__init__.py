"""Optimizers: the Newton-Krylov method as a ``torch.optim.Optimizer``."""

from imstep.curvature.choice import ExactHessian, GaussNewtonFirst
from imstep.optim.forcing import BestRateForcing, FixedProducts, ResidualForcing
from imstep.optim.growing import GrowingBatches
from imstep.optim.least_squares import LeastSquares
from imstep.optim.minimize import MinimizeResult, Termination, minimize
from imstep.optim.newton_krylov import NewtonKrylov
from imstep.optim.preconditioning import Hutchinson, Kronecker, NoPreconditioning, Nystrom, SquaredGradients
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.recycling import Recycling
from imstep.optim.solving import (
    BlendedConjugateGradient,
    ConjugateGradient,
    Direct,
    GeneralizedLanczos,
    MinimalResidual,
    NewtonSystem,
    Solver,
    SteihaugToint,
)
from imstep.optim.stepwise import NonFiniteLossError

__all__ = [
    "BestRateForcing",
    "BlendedConjugateGradient",
    "ConjugateGradient",
    "Cost",
    "Direct",
    "ExactHessian",
    "FixedProducts",
    "GaussNewtonFirst",
    "GeneralizedLanczos",
    "GrowingBatches",
    "Hutchinson",
    "Kronecker",
    "LeastSquares",
    "MinimalResidual",
    "MinimizeResult",
    "NewtonKrylov",
    "NewtonSystem",
    "NoPreconditioning",
    "NonFiniteLossError",
    "Nystrom",
    "Recycling",
    "ResidualForcing",
    "Solver",
    "SquaredGradients",
    "SteihaugToint",
    "StepOutcome",
    "StepRecord",
    "Termination",
    "minimize",
]
