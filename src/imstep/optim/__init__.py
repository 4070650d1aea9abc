"""Optimizers: the Newton-Krylov method as a ``torch.optim.Optimizer``."""

from imstep.curvature.choice import ExactHessian, FisherCurvature, GaussNewtonFirst
from imstep.optim.averaging import ExponentialAverage, TailAverage
from imstep.optim.backtracking import IterateBacktracking
from imstep.optim.balancing import Balancing, EqualGradients, EqualTraces
from imstep.optim.between import QuasiNewtonSteps
from imstep.optim.block_diagonal import BlockDiagonal
from imstep.optim.box import Box
from imstep.optim.checking import OverfittingWarning
from imstep.optim.diagonal_newton import DiagonalNewton
from imstep.optim.diagonal_rules import AdaHessianRule, DiagonalRule, HessianScaledMomentum, SophiaG, SophiaH
from imstep.optim.forcing import BestRateForcing, FixedProducts, ResidualForcing
from imstep.optim.globalized import (
    CubicRegularization,
    Dogleg,
    LearntModel,
    PreconditionedGradient,
    SaddleFree,
    TwoDimensionalSubspace,
)
from imstep.optim.growing import GrowingBatches
from imstep.optim.growing_points import GrowingPoints
from imstep.optim.least_squares import LeastSquares
from imstep.optim.micro_batches import MicroBatches
from imstep.optim.minimize import minimize
from imstep.optim.minimize_result import IntermediateResult, MinimizeResult
from imstep.optim.newton_krylov import NewtonKrylov
from imstep.optim.preconditioned_momentum import PreconditionedMomentum
from imstep.optim.preconditioning import (
    BFGS,
    SOAP,
    SR1,
    AutomaticRate,
    BlockBFGS,
    FactoredDamping,
    GradientFactors,
    Hutchinson,
    KLShampoo,
    Kronecker,
    KroneckerEigenbasis,
    LimitedMemoryBFGS,
    NoPreconditioning,
    Nystrom,
    QuasiNewton,
    RankOneModel,
    SelfScaledBroyden,
    Shampoo,
    SquaredGradients,
    TikhonovDamping,
)
from imstep.optim.preconditioning.recycling import Recycling
from imstep.optim.randomized import RandomSubspace
from imstep.optim.recall import EarlierDraws
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.scaling import ColumnNorms, Scaling, Unscaled
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
from imstep.optim.stopping_tests import Termination
from imstep.optim.third_order import ChebyshevHalley
from imstep.optim.variance_reduction import VarianceReduction

__all__ = [
    "BFGS",
    "SOAP",
    "SR1",
    "AdaHessianRule",
    "AutomaticRate",
    "Balancing",
    "BestRateForcing",
    "BlendedConjugateGradient",
    "BlockBFGS",
    "BlockDiagonal",
    "Box",
    "ChebyshevHalley",
    "ColumnNorms",
    "ConjugateGradient",
    "Cost",
    "CubicRegularization",
    "DiagonalNewton",
    "DiagonalRule",
    "Direct",
    "Dogleg",
    "EarlierDraws",
    "EqualGradients",
    "EqualTraces",
    "ExactHessian",
    "ExponentialAverage",
    "FactoredDamping",
    "FisherCurvature",
    "FixedProducts",
    "GaussNewtonFirst",
    "GeneralizedLanczos",
    "GradientFactors",
    "GrowingBatches",
    "GrowingPoints",
    "HessianScaledMomentum",
    "Hutchinson",
    "IntermediateResult",
    "IterateBacktracking",
    "KLShampoo",
    "Kronecker",
    "KroneckerEigenbasis",
    "LearntModel",
    "LeastSquares",
    "LimitedMemoryBFGS",
    "MicroBatches",
    "MinimalResidual",
    "MinimizeResult",
    "NewtonKrylov",
    "NewtonSystem",
    "NoPreconditioning",
    "NonFiniteLossError",
    "Nystrom",
    "OverfittingWarning",
    "PreconditionedGradient",
    "PreconditionedMomentum",
    "QuasiNewton",
    "QuasiNewtonSteps",
    "RandomSubspace",
    "RankOneModel",
    "Recycling",
    "ResidualForcing",
    "SaddleFree",
    "Scaling",
    "SelfScaledBroyden",
    "Shampoo",
    "Solver",
    "SophiaG",
    "SophiaH",
    "SquaredGradients",
    "SteihaugToint",
    "StepOutcome",
    "StepRecord",
    "TailAverage",
    "Termination",
    "TikhonovDamping",
    "TwoDimensionalSubspace",
    "Unscaled",
    "VarianceReduction",
    "minimize",
]
