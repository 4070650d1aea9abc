"""How a Krylov iteration is preconditioned: exchangeable preconditioners."""

from imstep.optim.preconditioning.automatic_rate import AutomaticRate
from imstep.optim.preconditioning.base import (
    OTHER_STATE,
    Evidence,
    NoPreconditioning,
    Preconditioner,
    Preconditioning,
)
from imstep.optim.preconditioning.block_bfgs import BlockBFGS
from imstep.optim.preconditioning.diagonal import Hutchinson, SquaredGradients
from imstep.optim.preconditioning.gradient_factors import GradientFactors
from imstep.optim.preconditioning.kronecker import (
    FactoredDamping,
    Kronecker,
    KroneckerEigenbasis,
    TikhonovDamping,
)
from imstep.optim.preconditioning.nystrom import Nystrom
from imstep.optim.preconditioning.quasi_newton import BFGS, SR1, LimitedMemoryBFGS, QuasiNewton, SelfScaledBroyden
from imstep.optim.preconditioning.rank_one import RankOneModel
from imstep.optim.preconditioning.shampoo import SOAP, KLShampoo, Shampoo

__all__ = [
    "BFGS",
    "OTHER_STATE",
    "SOAP",
    "SR1",
    "AutomaticRate",
    "BlockBFGS",
    "Evidence",
    "FactoredDamping",
    "GradientFactors",
    "Hutchinson",
    "KLShampoo",
    "Kronecker",
    "KroneckerEigenbasis",
    "LimitedMemoryBFGS",
    "NoPreconditioning",
    "Nystrom",
    "Preconditioner",
    "Preconditioning",
    "QuasiNewton",
    "RankOneModel",
    "SelfScaledBroyden",
    "Shampoo",
    "SquaredGradients",
    "TikhonovDamping",
]
