"""imstep: second-order training of neural networks in PyTorch by the complex-step derivative."""

from imstep import insight, methods, pde, spectral
from imstep.complexstep import (
    ComplexStepTensor,
    NotDifferentiableWarning,
    UnsupportedOperatorError,
    derivative,
    hvp,
    jvp,
    third_derivative,
)
from imstep.curvature import Fisher, GaussNewton, Hessian, Jacobian
from imstep.optim import LeastSquares, MicroBatches, NewtonKrylov, minimize

__version__ = "0.1.0"

__all__ = [
    "ComplexStepTensor",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "LeastSquares",
    "MicroBatches",
    "NewtonKrylov",
    "NotDifferentiableWarning",
    "UnsupportedOperatorError",
    "__version__",
    "derivative",
    "hvp",
    "insight",
    "jvp",
    "methods",
    "minimize",
    "pde",
    "spectral",
    "third_derivative",
]
