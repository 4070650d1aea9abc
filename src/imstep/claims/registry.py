"""All claims, in the order of the abstract."""

from __future__ import annotations

from imstep.claims import derivatives, steps, training
from imstep.claims.claim import Claim

__all__ = ["CLAIMS"]

_ALL = (
    Claim("accuracy", "as accurate as the analytic result, whatever h", derivatives.accuracy, "imstep accuracy"),
    Claim("symmetry", "the matrix of second derivatives, all of it", derivatives.symmetry, "pytest tests/curvature"),
    Claim("cost", "efficient: no matrix is made or inverted", derivatives.cost, "python -m benchmarks.products"),
    Claim("methods", "any known second-order method", steps.methods, "python -m benchmarks.methods"),
    Claim(
        "termination", "the Krylov iteration ends as soon as a disturbing direction is found", steps.termination,
        "python -m benchmarks.termination",
    ),
    Claim(
        "taylor-monitor", "the error of the Taylor expansion adjusts the step size", steps.taylor_monitor,
        "python -m benchmarks.step_control",
    ),
    Claim(
        "global-convergence", "good global convergence", steps.global_convergence,
        "python -m benchmarks.more_garbow_hillstrom",
    ),
    Claim("local-convergence", "good local convergence", steps.local_convergence, "pytest tests/optim/test_local.py"),
    Claim(
        "mini-batches", "noisy second-order information does not contaminate", training.mini_batches,
        "python -m benchmarks.minibatch",
    ),
    Claim("outperforms", "outperforms existing methods", training.outperforms, "imstep bench"),
    Claim("faster", "often converges one order faster", training.faster, "imstep bench"),
)  # fmt: skip
CLAIMS: dict[str, Claim] = {claim.name: claim for claim in _ALL}
