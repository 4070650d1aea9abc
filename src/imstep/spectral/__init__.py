"""Questions about a matrix that is known by its products: its eigenvalues, their density, its trace and diagonal.

    from imstep import spectral
    spectral.eigenpairs(imstep.Hessian(closure, model), k=10).values

The matrix may be all that :func:`imstep.linalg.as_operator` takes: a tensor, an array, an operator of SciPy.
"""

from imstep.spectral.density import SpectralDensity, density
from imstep.spectral.eigenpairs import Eigenpairs, EigenProgress, eigenpairs
from imstep.spectral.estimates import DiagonalEstimate, Estimate, diagonal, trace
from imstep.spectral.functions import condition_number, frobenius_norm, log_determinant
from imstep.spectral.low_rank import low_rank

__all__ = [
    "DiagonalEstimate",
    "EigenProgress",
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "condition_number",
    "density",
    "diagonal",
    "eigenpairs",
    "frobenius_norm",
    "log_determinant",
    "low_rank",
    "trace",
]
