"""Known second-order methods by name: functions that put the parts of `imstep` together as a paper has them.

Each returns a configured optimizer, mostly a :class:`~imstep.NewtonKrylov`; ``optimizer.step(closure)`` takes a step.
Keyword arguments are those of its constructor, in place of the method's own.

Example:
    >>> import torch
    >>> from imstep import methods
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = methods.cubic_regularization([w])
    >>> for _ in range(100):
    ...     loss = optimizer.step(lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    >>> [round(x, 6) for x in w.tolist()]
    [1.0, 1.0]
"""

from imstep.methods.convex import gauss_newton, hessian_free, levenberg_marquardt, natural_gradient
from imstep.methods.diagonal import adahessian, hessian_momentum, sophia
from imstep.methods.hessian import (
    absolute_newton,
    cubic_regularization,
    newton,
    newton_cg,
    newton_mr,
    saddle_free_newton,
    shifted_newton,
    trust_region,
)
from imstep.methods.kronecker import ekfac, kfac, kl_shampoo, shampoo, soap
from imstep.methods.quasi_newton import bfgs, block_bfgs, enriched_newton, lbfgs, lsr1, self_scaled_broyden, sr1
from imstep.methods.sketched import nystrom_newton_cg, randomized_subspace_newton
from imstep.methods.stochastic import sketchy_sgd, sketchy_svrg, stochastic_cubic, subsampled_newton
from imstep.methods.third_order import chebyshev, halley, super_halley

__all__ = [
    "absolute_newton",
    "adahessian",
    "bfgs",
    "block_bfgs",
    "chebyshev",
    "cubic_regularization",
    "ekfac",
    "enriched_newton",
    "gauss_newton",
    "halley",
    "hessian_free",
    "hessian_momentum",
    "kfac",
    "kl_shampoo",
    "lbfgs",
    "levenberg_marquardt",
    "lsr1",
    "natural_gradient",
    "newton",
    "newton_cg",
    "newton_mr",
    "nystrom_newton_cg",
    "randomized_subspace_newton",
    "saddle_free_newton",
    "self_scaled_broyden",
    "shampoo",
    "shifted_newton",
    "sketchy_sgd",
    "sketchy_svrg",
    "soap",
    "sophia",
    "sr1",
    "stochastic_cubic",
    "subsampled_newton",
    "super_halley",
    "trust_region",
]
