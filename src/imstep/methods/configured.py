"""What methods are configured by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from imstep.curvature.choice import ExactHessian, GaussNewtonFirst
from imstep.globalization import NoDamping
from imstep.optim.forcing import ResidualForcing
from imstep.optim.newton_krylov import NewtonKrylov, NewtonKrylovOptions
from imstep.optim.preconditioning import NoPreconditioning


def on_hessian(params: Iterable[Any], method: NewtonKrylovOptions, options: NewtonKrylovOptions) -> NewtonKrylov:
    """On the Hessian, undamped and without a preconditioner unless the method or the user says otherwise."""
    configuration: NewtonKrylovOptions = {
        "curvature": ExactHessian(),
        "forcing": ResidualForcing(),
        "damping": NoDamping(),
        "preconditioning": NoPreconditioning(),
    }
    configuration.update(method)
    configuration.update(options)
    return NewtonKrylov(params, **configuration)


def on_gauss_newton(params: Iterable[Any], method: NewtonKrylovOptions, options: NewtonKrylovOptions) -> NewtonKrylov:
    """The same on Gauss-Newton."""
    return on_hessian(params, {"curvature": GaussNewtonFirst(close=0.0), **method}, options)
