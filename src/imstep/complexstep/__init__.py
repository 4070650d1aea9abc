"""Complex-step arithmetic: derivatives of PyTorch code from an imaginary perturbation of its inputs."""

from imstep.complexstep.arithmetic import Arithmetic
from imstep.complexstep.errors import ComplexStepError, NotDifferentiableWarning, UnsupportedOperatorError
from imstep.complexstep.functional import derivative, hvp, jvp, third_derivative
from imstep.complexstep.tensor import ComplexStepTensor

__all__ = [
    "Arithmetic",
    "ComplexStepError",
    "ComplexStepTensor",
    "NotDifferentiableWarning",
    "UnsupportedOperatorError",
    "derivative",
    "hvp",
    "jvp",
    "third_derivative",
]
