"""How a Krylov iteration is preconditioned: exchangeable preconditioners."""

from imstep.optim.preconditioning.base import (
    OTHER_STATE,
    Evidence,
    NoPreconditioning,
    Preconditioner,
    Preconditioning,
)
from imstep.optim.preconditioning.diagonal import Hutchinson, SquaredGradients
from imstep.optim.preconditioning.kronecker import Kronecker
from imstep.optim.preconditioning.nystrom import Nystrom

__all__ = [
    "OTHER_STATE",
    "Evidence",
    "Hutchinson",
    "Kronecker",
    "NoPreconditioning",
    "Nystrom",
    "Preconditioner",
    "Preconditioning",
    "SquaredGradients",
]
