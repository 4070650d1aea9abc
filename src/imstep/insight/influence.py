"""Which training examples a prediction rests on."""

from __future__ import annotations

from torch import Tensor

from imstep.insight.outputs import Outputs, linearised, parameters_of, rows_of
from imstep.linalg import LinearOperator
from imstep.uncompiled import uncompiled


@uncompiled
def influence(
    curvature: LinearOperator,
    losses: Outputs,
    target: Outputs,
    *,
    damping: float = 0.0,
    weight: float | None = None,
    preconditioner: LinearOperator | None = None,
    rtol: float | None = None,
) -> Tensor:
    """How much a target would rise if a training example were left out and the model trained anew, to first order.

        L(w₋ᵢ) - L(w)  ≈  weight · ∇ℓᵢᵀ (H + λI)⁻¹ ∇L

    Positive for examples that the target profits from, negative for those that it suffers from. Influences of several
    examples add up. The model should be trained to its minimum: what is left of the gradient is not seen.

    Args:
        curvature: H, the Hessian (or Gauss-Newton matrix) of the training loss, penalties included.
        losses: a closure that returns the losses ℓ of the training examples, (N,), without penalties; or their
            Jacobian, which may be one by ``Jacobian.over``.
        target: a closure that returns what is asked about, such as the loss of a test example: 0-dim, or (m,) for
            several; or its Jacobian.
        damping: λ >= 0; for a Hessian that is singular, as those of networks are. It counts as a penalty λ/2 on how far
            the weights move.
        weight: of an example in the training loss: 1/N, as in a mean, unless given; 1 for a sum. To be given where the
            curvature is of several processes, and the losses are of one.
        preconditioner, rtol: of the solves, as for :meth:`~imstep.linalg.LinearOperator.inverse`.

    Returns:
        The influences, (N,), or (N, m) for several targets.

    Raises:
        NotSolvedError: a solve did not succeed, as where H + λI is singular.
        ValueError: the losses are not one-dimensional; the matrix belongs to other parameters, or to none.

    Cost: a solve and a backward pass for each target; a product with the Jacobian of the losses for each, over all
    examples at once. No gradient of a single example is formed.

    Source: Koh and Liang, ICML 2017 (arXiv 1703.04730), equation (2); in statistics, Cook and Weisberg (1982). That the
    examples need one forward product together is the order of multiplication.

    Example:
        >>> import torch
        >>> import imstep
        >>> w, y = torch.nn.Parameter(torch.tensor([2.0])), torch.tensor([1.0, 2.0, 3.0])  # the mean of y
        >>> losses = lambda: (w - y) ** 2 / 2
        >>> H = imstep.Hessian(lambda: losses().mean(), [w])
        >>> influence(H, losses, lambda: w.sum())  # leaving out the 1 raises the mean
        tensor([ 0.3333,  0.0000, -0.3333])
    """
    examples, asked = linearised(losses, curvature), linearised(target, curvature)
    if examples.outputs.ndim != 1 or len(examples.outputs) == 0:
        raise ValueError(
            f"losses has the shape {tuple(examples.outputs.shape)}; it is one loss for each training example, (N,). "
            'Build the loss with reduction="none", and sum over all that belongs to one example.'
        )
    several = parameters_of(curvature).processes is not None
    if weight is None and several and examples.parameters.processes is None:
        raise ValueError(
            "the curvature is that of several processes, and losses are of this one alone: how many examples there are "
            "in all is not known. Pass weight=1/N with their number, or the Jacobian of all losses, by "
            "Jacobian.over(..., process_group=)."
        )
    share = 1 / len(examples.outputs) if weight is None else weight
    inverse = curvature.inverse(damping, preconditioner, rtol=rtol)
    values = share * (examples @ (inverse @ rows_of(asked)))
    return values[:, 0] if asked.outputs.ndim == 0 else values.reshape(len(values), *asked.outputs.shape)
