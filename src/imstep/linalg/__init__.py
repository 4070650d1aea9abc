"""Linear operators and Krylov solvers on flat vectors; knows neither autograd nor models."""

from imstep.linalg.cg import conjugate_gradient
from imstep.linalg.explicit import DenseOperator, DiagonalOperator, IdentityOperator
from imstep.linalg.halved import HalvedOperator, NoiseTest, SplitOperator
from imstep.linalg.lanczos import Eigenpair, LanczosResult, lanczos, largest_eigenpair, smallest_eigenpair
from imstep.linalg.operator import LinearOperator, ScaledOperator, SumOperator
from imstep.linalg.result import KrylovResult, KrylovStatus
from imstep.linalg.stopping import (
    BestRate,
    ProductBudget,
    Progress,
    ProgressStall,
    RelativeResidual,
    StoppingRule,
)

__all__ = [
    "BestRate",
    "DenseOperator",
    "DiagonalOperator",
    "Eigenpair",
    "HalvedOperator",
    "IdentityOperator",
    "KrylovResult",
    "KrylovStatus",
    "LanczosResult",
    "LinearOperator",
    "NoiseTest",
    "ProductBudget",
    "Progress",
    "ProgressStall",
    "RelativeResidual",
    "ScaledOperator",
    "SplitOperator",
    "StoppingRule",
    "SumOperator",
    "conjugate_gradient",
    "lanczos",
    "largest_eigenpair",
    "smallest_eigenpair",
]
