"""imstep: second-order training of neural networks in PyTorch by the complex-step derivative."""

from imstep.complexstep import ComplexStepTensor, UnsupportedOperatorError, derivative, hvp, jvp

__version__ = "0.1.0"

__all__ = ["ComplexStepTensor", "UnsupportedOperatorError", "__version__", "derivative", "hvp", "jvp"]
