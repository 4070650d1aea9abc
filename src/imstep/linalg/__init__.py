"""Linear operators and Krylov solvers on flat vectors; knows neither autograd nor models."""

from imstep.linalg.arguments import IndefinitePreconditionerError
from imstep.linalg.blended import blended_conjugate_gradient
from imstep.linalg.block_bfgs import BlockBFGSPreconditioner
from imstep.linalg.block_diagonal import BlockDiagonalOperator
from imstep.linalg.box import box_least_squares
from imstep.linalg.by_shape import ByShape, PivotedQR, SketchedFactorisation, ThinFactorisation
from imstep.linalg.cg import conjugate_gradient
from imstep.linalg.composed import ProductOperator, ScaledOperator, SubmatrixOperator, SumOperator
from imstep.linalg.conversion import as_operator
from imstep.linalg.cubic import cubic_regularization, dense_cubic_regularization
from imstep.linalg.dense import (
    AbsoluteEigenvalues,
    IndefiniteRule,
    ShiftedEigenvalues,
    dense_solve,
    dense_trust_region,
)
from imstep.linalg.diagonal import DiagonalEstimate, diagonal_preconditioner, hutchinson_diagonal
from imstep.linalg.dogleg import dogleg, two_dimensional_subspace
from imstep.linalg.explicit import DenseOperator, DiagonalOperator, IdentityOperator, LowRankOperator
from imstep.linalg.gltr import gltr
from imstep.linalg.gram import DenseGram, DenseRows, GramMatrix, RowMatrix, RowsGram, ScaledRows
from imstep.linalg.gram_factor import GramFactor
from imstep.linalg.gram_factorisation import (
    DenseFactorisation,
    Factorisation,
    GramFactorisation,
    PivotedCholesky,
    RandomizedNystrom,
    StepSpace,
)
from imstep.linalg.gram_nystrom import gram_nystrom
from imstep.linalg.halved import HalvedOperator, NoiseTest, SplitOperator
from imstep.linalg.inverse import InverseOperator, InverseSolution, NotSolvedError
from imstep.linalg.iterative import IterativeLeastSquares
from imstep.linalg.lanczos import Eigenpair, LanczosResult, lanczos, largest_eigenpair, smallest_eigenpair
from imstep.linalg.limited_memory import LimitedMemoryPreconditioner
from imstep.linalg.minres import minres
from imstep.linalg.normal import NormalEquations, NormalLeastSquares
from imstep.linalg.nystrom import NystromApproximation, NystromPreconditioner, adaptive_nystrom, nystrom
from imstep.linalg.operator import LinearOperator
from imstep.linalg.partial_cholesky import partial_cholesky
from imstep.linalg.partial_qr import RowFactor, RowLeastSquares, partial_qr
from imstep.linalg.quasi_newton import bfgs_update, self_scaled_update, sr1_update
from imstep.linalg.rank_one import RankOneOperator
from imstep.linalg.reduced import DampedLeastSquares, DenseLeastSquares, GramLeastSquares, ReducedLeastSquares
from imstep.linalg.result import KrylovResult, KrylovStatus
from imstep.linalg.ridge import RidgeLeastSquares
from imstep.linalg.saddle_free import saddle_free
from imstep.linalg.sketched_newton import sketched_newton
from imstep.linalg.sketched_rows import sketched_rows
from imstep.linalg.steihaug import steihaug_toint
from imstep.linalg.stopping import (
    BestRate,
    ProductBudget,
    Progress,
    ProgressStall,
    RelativeResidual,
    StoppingRule,
)
from imstep.linalg.thin import BoxLeastSquares, ThinLeastSquares
from imstep.linalg.triangular import BlockQR, TriangularLeastSquares

__all__ = [
    "AbsoluteEigenvalues",
    "BestRate",
    "BlockBFGSPreconditioner",
    "BlockDiagonalOperator",
    "BlockQR",
    "BoxLeastSquares",
    "ByShape",
    "DampedLeastSquares",
    "DenseFactorisation",
    "DenseGram",
    "DenseLeastSquares",
    "DenseOperator",
    "DenseRows",
    "DiagonalEstimate",
    "DiagonalOperator",
    "Eigenpair",
    "Factorisation",
    "GramFactor",
    "GramFactorisation",
    "GramLeastSquares",
    "GramMatrix",
    "HalvedOperator",
    "IdentityOperator",
    "IndefinitePreconditionerError",
    "IndefiniteRule",
    "InverseOperator",
    "InverseSolution",
    "IterativeLeastSquares",
    "KrylovResult",
    "KrylovStatus",
    "LanczosResult",
    "LimitedMemoryPreconditioner",
    "LinearOperator",
    "LowRankOperator",
    "NoiseTest",
    "NormalEquations",
    "NormalLeastSquares",
    "NotSolvedError",
    "NystromApproximation",
    "NystromPreconditioner",
    "PivotedCholesky",
    "PivotedQR",
    "ProductBudget",
    "ProductOperator",
    "Progress",
    "ProgressStall",
    "RandomizedNystrom",
    "RankOneOperator",
    "ReducedLeastSquares",
    "RelativeResidual",
    "RidgeLeastSquares",
    "RowFactor",
    "RowLeastSquares",
    "RowMatrix",
    "RowsGram",
    "ScaledOperator",
    "ScaledRows",
    "ShiftedEigenvalues",
    "SketchedFactorisation",
    "SplitOperator",
    "StepSpace",
    "StoppingRule",
    "SubmatrixOperator",
    "SumOperator",
    "ThinFactorisation",
    "ThinLeastSquares",
    "TriangularLeastSquares",
    "adaptive_nystrom",
    "as_operator",
    "bfgs_update",
    "blended_conjugate_gradient",
    "box_least_squares",
    "conjugate_gradient",
    "cubic_regularization",
    "dense_cubic_regularization",
    "dense_solve",
    "dense_trust_region",
    "diagonal_preconditioner",
    "dogleg",
    "gltr",
    "gram_nystrom",
    "hutchinson_diagonal",
    "lanczos",
    "largest_eigenpair",
    "minres",
    "nystrom",
    "partial_cholesky",
    "partial_qr",
    "saddle_free",
    "self_scaled_update",
    "sketched_newton",
    "sketched_rows",
    "smallest_eigenpair",
    "sr1_update",
    "steihaug_toint",
    "two_dimensional_subspace",
]
