"""Differential operators of a network with respect to its inputs, by one forward pass.

    expand(f, points, second=(0,), laplacian=(0, 1))     value, first and second derivatives together
    gradient, divergence, laplacian, directional         one of them
    sobol_points(sides, count)                           points of a box that leave no gaps
    boundary_points(sides, count)                        such points of its faces
    adaptive_points(residual, candidates, count)         points where an equation is missed most
    weighted_points(residual, sides, count)              such points of a box, with weights
"""

from imstep.pde.adaptive import adaptive_points
from imstep.pde.even import boundary_points, sobol_points
from imstep.pde.jet import ExpansionError, Jet
from imstep.pde.operators import Expansion, directional, divergence, expand, gradient, laplacian
from imstep.pde.weighted import weighted_points

__all__ = [
    "Expansion",
    "ExpansionError",
    "Jet",
    "adaptive_points",
    "boundary_points",
    "directional",
    "divergence",
    "expand",
    "gradient",
    "laplacian",
    "sobol_points",
    "weighted_points",
]
